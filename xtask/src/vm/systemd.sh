#!/bin/sh
# Makes the root image OUT/root.img of another one: a Debian with systemd as its first process, and more packages. It needs root.
# Arguments: OUT, IMAGE (what it is made of) and the packages.
set -eu
out=$1 image=$2
shift 2
exec >"$out/log" 2>&1
root=$out/root
mkdir "$root"
cp --sparse=always "$image" "$out/root.img"
mount -o loop "$out/root.img" "$root"
mount -t proc proc "$root/proc"
mount -t devtmpfs dev "$root/dev"
cp /etc/resolv.conf "$root/etc/resolv.conf"
# No service starts while the image is made.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
apt="apt-get --quiet --yes --option Acquire::Retries=3 --option APT::Sandbox::User=root"
chroot "$root" $apt update
chroot "$root" $apt install --no-install-recommends "$@"
chroot "$root" apt-get clean
rm "$root/usr/sbin/policy-rc.d"
rm -rf "$root"/var/lib/apt/lists/*
umount "$root/dev" "$root/proc" "$root"
rmdir "$root"
