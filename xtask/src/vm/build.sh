#!/bin/sh
# Builds the virtual machine in the empty directory OUT: vmlinuz, initramfs.gz and root.img. It needs root. Everything comes from
# Debian packages; none is installed on this machine.
# Arguments: OUT, SUITE, MIRROR, DEBS (a directory that keeps downloaded packages), INIT (the initramfs's first program) and
# PACKAGES (those of the root image, separated by commas).
set -eu
out=$1 suite=$2 mirror=$3 debs=$4 init=$5 packages=$6
root=$out/root kernel=$out/kernel ram=$out/ram
mkdir -p "$debs" "$kernel" "$ram/bin" "$ram/dev" "$ram/modules" "$ram/root"

bootstrap() {
	rm -rf "$root"
	# What is half written after a crash is thrown away, so nothing waits for the disk.
	mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
	echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io"
	debootstrap --variant=minbase --cache-dir="$debs" --include="$packages" "$suite" "$root" "$mirror" >"$out/log" 2>&1
}
# Mirrors fail at times. What was downloaded is not downloaded again.
bootstrap || bootstrap || bootstrap || {
	tail -n 20 "$out/log" "$root/debootstrap/debootstrap.log" >&2
	exit 1
}

# Of what libvirt-daemon-system would bring, with half a desktop, libvirtd only needs this.
chroot "$root" useradd --system --user-group libvirt-qemu

# The kernel, unpacked and not installed: its scripts would look for a boot loader.
chroot "$root" apt-get update --quiet=2
package=$(chroot "$root" apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
chroot "$root" sh -c "cd /tmp && apt-get download --quiet=2 -o APT::Sandbox::User=root $package"
dpkg -x "$root"/tmp/linux-image-*.deb "$kernel"
rm "$root"/tmp/linux-image-*.deb
version=$(basename "$kernel"/lib/modules/*)
depmod -b "$kernel" "$version"
cp "$kernel/boot/vmlinuz-$version" "$out/vmlinuz"
mkdir -p "$root/lib/modules"
cp -r "$kernel/lib/modules/$version" "$root/lib/modules/$version"

# The initramfs: what it takes to mount the root image.
cp /bin/busybox "$ram/bin/busybox"
install -m 755 "$init" "$ram/init"
for module in virtio_pci virtio_blk ext4; do
	modprobe -d "$kernel" -S "$version" --show-depends "$module"
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
	cp "$file" "$ram/modules/"
	echo "/modules/$(basename "$file")" >>"$ram/modules/order"
done
(cd "$ram" && find . | cpio --quiet -o -H newc) | gzip -1 >"$out/initramfs.gz"

rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
mke2fs -q -F -t ext4 -d "$root" "$out/root.img" 4G
rm -rf "$root" "$kernel" "$ram"
