# The way of an administrator on a host with libvirt: install, look, filter a QEMU guest with the domain it had before, uninstall.
fail() { echo "FAILED: $*" >&2; exit 1; }
has() { echo "$1" | grep -qF -- "$2" || fail "no '$2' in: $1"; }
guests() { virsh --connect qemu:///system "$@"; }
filters() { virsh --connect nwfilter:///system "$@"; }
ours() { nwfilterctl --config-dir /etc/libvirt/nwfilter --state-dir /run/libvirt/nwfilter-binding "$@"; }
libvirtd_starts() {
    rm -f /run/libvirtd.pid
    libvirtd --daemon --pid-file /run/libvirtd.pid || fail "libvirtd does not start"
    filters nwfilter-list >/dev/null || fail "libvirtd does not answer"
}
libvirtd_ends() {
    kill "$(cat /run/libvirtd.pid)"
    while [ -e "/proc/$(cat /run/libvirtd.pid 2>/dev/null || echo none)" ]; do sleep 0.1; done
}
drivers=/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH)/libvirt/connection-driver
libvirts=$(sha256sum <"$drivers/libvirt_driver_nwfilter.so")

# A host as it is: a bridge, libvirt, and a domain with a filter.
ip link add br0 type bridge
ip link set br0 up
mkdir -p /run/libvirt /etc/libvirt
printf '%s\n' 'security_driver = "none"' 'user = "root"' 'group = "root"' 'cgroup_controllers = []' 'namespaces = []' \
    'stdio_handler = "file"' >/etc/libvirt/qemu.conf
cat >/tmp/guest.xml <<X
<domain type='qemu'><name>adopted</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>
<interface type='bridge'><mac address='52:54:00:7b:35:93'/><source bridge='br0'/><model type='virtio'/>
<filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.2'/></filterref></interface></devices></domain>
X

begin=$(date +%s)
echo "-- units are where systemd finds what they start"
dpkg --install /job/nwfilter_*.deb /job/nwfilter-listen_*.deb >/tmp/out 2>&1 || fail "$(cat /tmp/out)"
systemd-analyze verify --man=no /usr/lib/systemd/system/nwfilter.service /usr/lib/systemd/system/nwfilter-listen.service ||
    fail "systemd-analyze verify"
dpkg --purge nwfilter-listen >/dev/null 2>&1

echo "-- install the module, and start the guest"
dpkg --install /job/libvirt-driver-nwfilter-rs_*.deb >/tmp/out 2>&1 || fail "$(cat /tmp/out)"
libvirtd_starts
guests define /tmp/guest.xml >/dev/null
guests start adopted >/dev/null || fail "the guest does not start"
echo "filtered $(($(date +%s) - begin)) seconds after the first command"

echo "-- the guest is filtered, and nwfilterctl says so"
has "$(filters nwfilter-binding-list)" vnet0
has "$(ebtables-save)" libvirt-I-vnet0
ours diff || fail "the kernel differs"
has "$(ours status)" vnet0
has "$(ours explain vnet0 out udp from 10.0.0.3 to 10.0.0.9:53 2>&1 || true)" vnet0
man nwfilterctl-status >/tmp/page 2>&1 || fail "no manual page"
has "$(cat /tmp/page)" "nwfilterctl status"
iptables -F
ebtables -t nat -F
until ours diff >/dev/null 2>&1; do sleep 0.1; done

echo "-- uninstall: libvirt's own driver takes over with the guest running"
dpkg --purge libvirt-driver-nwfilter-rs >/tmp/out 2>&1 || fail "$(cat /tmp/out)"
[ "$libvirts" = "$(sha256sum <"$drivers/libvirt_driver_nwfilter.so")" ] || fail "libvirt's module is not back"
libvirtd_ends
libvirtd_starts
has "$(guests list --name)" adopted
has "$(filters nwfilter-binding-list)" vnet0
has "$(ebtables-save)" libvirt-I-vnet0
guests destroy adopted >/dev/null
! ebtables-save | grep -q vnet0 || fail "rules of the guest stay"
dpkg --purge nwfilter >/tmp/out 2>&1 || fail "$(cat /tmp/out)"
[ ! -e /etc/nwfilter ] || fail "/etc/nwfilter stays"
libvirtd_ends
echo "-- passed"
