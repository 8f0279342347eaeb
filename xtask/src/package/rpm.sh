# Installs, upgrades and removes the RPM packages by rpm, in a copy of a system that has rpm and not what the packages depend on.
# /job has the packages; newer ones are in /job/new.
fail() { echo "FAILED: $*" >&2; exit 1; }
has() { echo "$1" | grep -qF -- "$2" || fail "no '$2' in: $1"; }
quietly() { "$@" >/tmp/out 2>&1 || fail "$*: $(cat /tmp/out)"; }
files() { find /etc /usr /var -xdev \( -path '/var/lib/rpm' -o -path /var/log \) -prune -o -print | sort; }
drivers=/usr/lib64/libvirt/connection-driver
module=$drivers/libvirt_driver_nwfilter.so
# libvirt's package of its driver, of a version.
libvirts() {
    cat >/tmp/libvirt.spec <<X
Name: libvirt-daemon-driver-nwfilter
Version: $1
Release: 1
Summary: libvirt's
License: LGPL
%description
libvirt's
%install
mkdir -p %{buildroot}$drivers
echo "libvirt's module $1" >%{buildroot}$module
%files
$module
X
    quietly rpmbuild -bb --define "_topdir /tmp/build" /tmp/libvirt.spec
    ls /tmp/build/RPMS/*/libvirt-daemon-driver-nwfilter-"$1"-*.rpm
}
old=$(libvirts 9.0.0)
new=$(libvirts 10.0.0)
quietly rpm --initdb
# What shells and libvirt have there on systems with RPM.
mkdir -p /usr/share/zsh/site-functions /usr/share/fish/vendor_completions.d /usr/share/licenses /usr/libexec /etc/libvirt/hooks/qemu.d \
    /etc/libvirt/hooks/lxc.d /usr/share/bash-completion/completions
quietly rpm --install --nodeps "$old"
files >/tmp/before

echo "-- install"
quietly rpm --install --nodeps /job/nwfilter-0*.rpm /job/nwfilter-listen-*.rpm /job/nwfilter-hook-*.rpm
for package in nwfilter nwfilter-listen nwfilter-hook; do
    quietly rpm --verify --nodeps "$package"
done
has "$(nwfilterctl --version)" nwfilterctl
has "$(nwfilterctl-listen --version)" nwfilterctl-listen
has "$(nwfilterctl list)" clean-traffic
echo "<domain type='qemu'><name>a</name></domain>" | /etc/libvirt/hooks/qemu.d/nwfilter a prepare begin - || fail "the hook fails"

echo "-- upgrade: settings that were changed stay"
echo 'timeout = 5' >>/etc/nwfilter/nwfilter.toml
quietly rpm --upgrade --nodeps /job/new/nwfilter-0*.rpm /job/new/nwfilter-listen-*.rpm /job/new/nwfilter-hook-*.rpm
has "$(rpm --query nwfilter)" "-2"
has "$(nwfilterctl config)" "/etc/nwfilter/nwfilter.toml:"

echo "-- the module has libvirt's place, also after upgrades of both"
quietly rpm --erase --nodeps nwfilter-listen nwfilter-hook
quietly rpm --install --nodeps /job/libvirt-driver-nwfilter-rs-*.rpm
ours() { cmp "$module" /usr/lib64/nwfilter/libvirt_driver_nwfilter.so || fail "$1: libvirt's module is in its place"; }
ours "after the installation"
has "$(cat "$module.libvirt")" "module 9.0.0"
quietly rpm --upgrade --nodeps /job/new/libvirt-driver-nwfilter-rs-*.rpm
ours "after an upgrade"
has "$(cat "$module.libvirt")" "module 9.0.0"
quietly rpm --upgrade --nodeps "$new"
ours "after an upgrade of libvirt"
has "$(cat "$module.libvirt")" "module 10.0.0"

echo "-- remove: libvirt's module is back, and nothing stays but what was changed"
quietly rpm --erase --nodeps libvirt-driver-nwfilter-rs nwfilter
has "$(cat "$module")" "module 10.0.0"
files >/tmp/after
left=$(comm -13 /tmp/before /tmp/after)
[ "$left" = "/etc/nwfilter
/etc/nwfilter/nwfilter.toml.rpmsave" ] || fail "files stay: $left"
quietly rpm --erase --nodeps libvirt-daemon-driver-nwfilter
[ ! -e "$module" ] || fail "libvirt's module stays"
echo "-- passed"
