# The way of an administrator on a host with systemd and libvirt that was booted: services, their settings, and guests. /job has the
# packages. What removing them leaves is seen by lifecycle.sh and adoption.sh.
set -eu
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
fail() {
    echo "FAILED: $*"
    systemctl --no-pager --full status nwfilter nwfilter-listen libvirtd 2>&1 | tail -n 60
    tail -n 5 /var/log/libvirt/qemu/*.log
    journalctl --no-pager --boot --lines 80 --unit nwfilter --unit nwfilter-listen --unit libvirtd
    exit 1
}
# What a program printed last.
quietly() { "$@" >/tmp/out 2>&1 || fail "$*: $(cat /tmp/out)"; }
has() { echo "$1" | grep -qF -- "$2" || fail "no '$2' in: $1"; }
eventually() {
    tries=0
    until eval "$1" >/tmp/out 2>&1; do
        [ $((tries += 1)) -lt 300 ] || fail "never: $1: $(cat /tmp/out)"
        sleep 0.1
    done
}
property() { systemctl show --value --property "$1" "$2"; }
logged() { journalctl --sync; journalctl --no-pager --output cat --unit "$1" | grep -F -- "$2"; }
step() { echo "-- $* ($(($(date +%s) - begin)) s)"; }
begin=$(date +%s)

step "the packages are installed, and start nothing"
quietly dpkg --install /job/nwfilter_*.deb /job/nwfilter-listen_*.deb
for unit in nwfilter nwfilter-listen; do
    [ "$(property ActiveState $unit)" = inactive ] || fail "$unit is started"
    [ "$(property UnitFileState $unit)" = disabled ] || fail "$unit is enabled"
    score=$(systemd-analyze security "$unit.service" --no-pager | sed -n 's/.*Overall exposure level[^0-9]*\([0-9.]*\).*/\1/p')
    case $score in [012].*) ;; *) fail "$unit has the exposure $score" ;; esac
done

step "the commands of the tutorial, as they stand there"
mkdir /root/tutorial
cd /root/tutorial
# Its files are written, and its commands go into a script; the rest is what they print.
awk '/^```xml,file=/ { file = substr($0, 13); next }
    /^```sh/ { block = "sh"; next }
    /^```console/ { block = "console"; next }
    /^```/ { file = block = ""; next }
    file { print >file }
    block == "sh" { print >"commands" }
    block == "console" && /^# / { print substr($0, 3) >"commands" }' /usr/share/doc/nwfilter/docs/tutorial.md
sh -x commands >/tmp/tutorial 2>&1 || fail "$(cat /tmp/tutorial)"
! grep -E '^error|not found' /tmp/tutorial || fail "$(cat /tmp/tutorial)"
has "$(cat /tmp/tutorial)" "1 filtered"
cd /

step "the service starts, and its start has ended when ports are filtered"
ip link add br0 type bridge forward_delay 0
ip link set br0 up
for name in guest client; do
    ip netns add $name
    ip link add $name-port type veth peer name eth0 netns $name
    ip link set $name-port master br0 up
    ip -n $name link set lo up
done
ip -n guest link set eth0 address 52:54:00:00:00:02 up
ip -n client link set eth0 address 52:54:00:00:00:03 up
ip -n guest address add 10.0.0.2/24 dev eth0
ip -n client address add 10.0.0.3/24 dev eth0
echo "<filter name='mine'><filterref filter='clean-traffic'/><rule action='drop' direction='in'><tcp dstportstart='81'/></rule></filter>" | nwfilterctl define - >/dev/null
cat >/tmp/binding.xml <<X
<filterbinding><owner><name>a</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner><portdev name='guest-port'/>
<mac address='52:54:00:00:00:02'/><filterref filter='mine'><parameter name='CTRL_IP_LEARNING' value='any'/></filterref></filterbinding>
X
modprobe -r br_netfilter
quietly systemctl enable --now nwfilter
[ "$(property ActiveState nwfilter)" = active ] || fail "it is not active"
has "$(property StatusText nwfilter)" "the bindings are enforced"

step "it learns an address"
quietly nwfilterctl binding-create /tmp/binding.xml
eventually "ip netns exec guest ping -c 1 -W 1 10.0.0.3 >/dev/null; nwfilterctl status | grep -F 10.0.0.2"
has "$(ebtables-save)" guest-port
[ "$(sysctl -n net.bridge.bridge-nf-call-iptables)" = 1 ] || fail "br_netfilter is not on"

step "it repairs what others change"
iptables -F
eventually "nwfilterctl diff"

step "it reads its settings again, and serves metrics"
sed -i 's|^#metrics = .*|metrics = "unix:/run/nwfilter/metrics"|' /etc/nwfilter/nwfilter.toml
quietly systemctl reload nwfilter
eventually "curl --silent --fail --unix-socket /run/nwfilter/metrics http://localhost/metrics | grep nwfilter_ports"
eventually "[ \"\$(systemctl show --value --property ActiveState nwfilter)\" = active ]"
pid=$(property MainPID nwfilter)
echo 'bakend = "xtables"' >>/etc/nwfilter/nwfilter.toml
quietly systemctl reload nwfilter
eventually "logged nwfilter 'the nearest is'"
[ "$(property MainPID nwfilter)" = "$pid" ] || fail "it does not survive wrong settings"
sed -i '$d' /etc/nwfilter/nwfilter.toml

step "it is started anew when it hangs, and when it is killed"
mkdir -p /run/systemd/system/nwfilter.service.d
printf '[Service]\nWatchdogSec=3\n' >/run/systemd/system/nwfilter.service.d/watchdog.conf
systemctl daemon-reload
quietly systemctl restart nwfilter
rules=$(ebtables-save | grep -c guest-port)
for signal in STOP KILL; do
    pid=$(property MainPID nwfilter)
    kill -$signal "$pid"
    eventually "[ \"\$(systemctl show --value --property MainPID nwfilter)\" != $pid ] && [ \"\$(systemctl show --value --property ActiveState nwfilter)\" = active ]"
    [ "$rules" = "$(ebtables-save | grep -c guest-port)" ] || fail "the rules are others"
done
eventually "logged nwfilter 'Watchdog timeout'"
rm -r /run/systemd/system/nwfilter.service.d
systemctl daemon-reload

step "rules stay when it is stopped"
quietly systemctl stop nwfilter
[ "$(property Result nwfilter)" = success ] || fail "it ends with $(property Result nwfilter)"
[ "$rules" = "$(ebtables-save | grep -c guest-port)" ] || fail "the rules are others"
[ -e /run/nwfilter/guest-port.xml ] || fail "the binding is gone"
nwfilterctl diff

step "with nftables it repairs its table, and programs ask it"
quietly nwfilterctl reload --backend nftables
sed -i 's|^#backend = .*|backend = "nftables"|' /etc/nwfilter/nwfilter.toml
quietly systemctl start nwfilter
nft list table bridge nwfilter >/tmp/out 2>&1 || fail "no table"
quietly nwfilterctl binding-delete guest-port
quietly nwfilterctl binding-create /tmp/binding.xml
eventually "ip netns exec guest ping -c 1 -W 1 10.0.0.3 >/dev/null; nwfilterctl status | grep -F 10.0.0.2"
# Only kernels from 6.9 on keep others from it.
nft flush table bridge nwfilter 2>/dev/null || true
eventually "nwfilterctl diff"
quietly nwfilterctl binding-delete guest-port
quietly systemctl disable --now nwfilter
sed -i 's|^backend = .*|#&|' /etc/nwfilter/nwfilter.toml
denied=$(journalctl --no-pager --boot --unit nwfilter --output cat | grep -iE 'not permitted|permission|denied' || true)
[ -z "$denied" ] || fail "the unit forbids what the service needs: $denied"

step "a libvirt without nwfilter driver: guests that start by themselves do so behind the guard"
drivers=/usr/lib/$(uname -m)-linux-gnu/libvirt/connection-driver
guests() { virsh --connect qemu:///system "$@"; }
domain() {
    echo "<domain type='qemu'><name>$1</name><memory unit='MiB'>32</memory><os><type>hvm</type></os>$2<devices>
    <interface type='bridge'><mac address='52:54:00:7b:35:93'/><source bridge='br0'/><model type='virtio'/>$3</interface></devices></domain>"
}
reference="<f:filterrefs xmlns:f='https://nwfilter.org/xmlns/filterref/1'><f:interface mac='52:54:00:7b:35:93'><f:filterref filter='clean-traffic'>
    <f:parameter name='IP' value='10.0.0.9'/></f:filterref></f:interface></f:filterrefs>"
domain own "<metadata>$reference</metadata>" "" >/tmp/own.xml
libvirtd_stops() { quietly systemctl stop libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket; }
libvirtd_stops
mv "$drivers/libvirt_driver_nwfilter.so" /tmp/
quietly systemctl start libvirtd
quietly guests define /tmp/own.xml
quietly guests autostart own
libvirtd_stops
quietly systemctl enable nwfilter-listen
quietly systemctl add-requires libvirtd.service nwfilter-listen.service
# Guests start by themselves once after a boot, of which libvirtd has this file.
rm -f /run/libvirt/qemu/autostarted
# As at boot, a target wants both at once.
cat >/run/systemd/system/booted.target <<X
[Unit]
Wants=libvirtd.service nwfilter-listen.service
After=libvirtd.service nwfilter-listen.service
X
systemctl daemon-reload
quietly systemctl start booted.target
ready=$(property ActiveEnterTimestampMonotonic nwfilter-listen) libvirt=$(property ExecMainStartTimestampMonotonic libvirtd)
[ "$ready" -le "$libvirt" ] || fail "libvirtd started at $libvirt, before the guard stood at $ready"
nft list table bridge nwfilter_guard >/tmp/out 2>&1 || fail "no guard"
eventually "virsh --connect qemu:///system domstate own | grep running"
eventually "nwfilterctl binding-list | grep vnet"
has "$(ebtables-save)" libvirt-I-vnet
eventually "nft list table bridge nwfilter_guard | grep vnet"
port=$(nwfilterctl binding-list | grep -o 'vnet[0-9]*' | head -n 1)
quietly systemctl reload nwfilter-listen
eventually "logged nwfilter-listen 'no setting has changed'"
quietly guests destroy own
eventually "! nwfilterctl binding-list | grep vnet"
quietly guests undefine own
step "without a guard libvirtd does not start, if it is told so"
libvirtd_stops
quietly systemctl stop nwfilter-listen
echo 'bakend = "xtables"' >>/etc/nwfilter/nwfilter.toml
! systemctl start libvirtd.service >/tmp/out 2>&1 || fail "libvirtd starts"
eventually "logged nwfilter-listen 'the nearest is'"
sed -i '$d' /etc/nwfilter/nwfilter.toml
quietly systemctl stop nwfilter-listen
quietly systemctl reset-failed nwfilter-listen
quietly systemctl start libvirtd.service
[ "$(property ActiveState nwfilter-listen)" = active ] || fail "libvirtd runs without the guard"
rm -r /etc/systemd/system/libvirtd.service.requires /run/systemd/system/booted.target
systemctl daemon-reload
denied=$(journalctl --no-pager --boot --unit nwfilter-listen --output cat | grep -iE 'not permitted|permission|denied' || true)
[ -z "$denied" ] || fail "the unit forbids what the service needs: $denied"
libvirtd_stops
mv /tmp/libvirt_driver_nwfilter.so "$drivers/"
quietly systemctl start libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd
quietly dpkg --purge nwfilter-listen
[ "$(property LoadState nwfilter-listen)" = not-found ] || fail "the unit is still there"
nft delete table bridge nwfilter_guard 2>/dev/null || true

step "the module: installing it starts libvirtd anew, with a guest running"
domain adopted "" "<filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.9'/></filterref>" >/tmp/adopted.xml
quietly guests define /tmp/adopted.xml
quietly guests start adopted
before=$(property MainPID libvirtd)
quietly dpkg --install /job/libvirt-driver-nwfilter-rs_*.deb
[ "$(property MainPID libvirtd)" != "$before" ] || fail "libvirtd has not started anew"
has "$(virsh --connect nwfilter:///system nwfilter-binding-list)" vnet
eventually "logged libvirtd 'backend Xtables' || ls -l /proc/\$(systemctl show --value --property MainPID libvirtd)/map_files | grep -F libvirt_driver_nwfilter.so"
ours() { nwfilterctl --config-dir /etc/libvirt/nwfilter --state-dir /run/libvirt/nwfilter-binding "$@"; }
ours diff || fail "the kernel differs"
iptables -F
eventually "nwfilterctl --config-dir /etc/libvirt/nwfilter --state-dir /run/libvirt/nwfilter-binding diff"
quietly virsh --connect nwfilter:///system nwfilter-define /root/tutorial/web.xml
sed -e 's/clean-traffic/web/' -e 's/adopted/second/' -e 's/7b:35:93/7b:35:94/' /tmp/adopted.xml >/tmp/second.xml
quietly guests define /tmp/second.xml
quietly guests start second
has "$(ours status)" web
quietly systemctl reload libvirtd
[ "$(virsh --connect nwfilter:///system nwfilter-binding-list | grep -c vnet)" = 2 ] || fail "a binding is lost"

echo "-- passed ($(($(date +%s) - begin)) s)"
