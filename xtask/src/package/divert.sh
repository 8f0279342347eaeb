# What the scripts of the RPM package do with libvirt's module: /job/divert-module, which RPM runs after each package is installed.
fail() { echo "FAILED: $*" >&2; exit 1; }
drivers=/usr/lib64/libvirt/connection-driver
module=$drivers/libvirt_driver_nwfilter.so
mkdir -p "$drivers" /usr/lib64/nwfilter
echo ours >/usr/lib64/nwfilter/libvirt_driver_nwfilter.so
holds() { [ "$(cat "$1")" = "$2" ] || fail "$1 holds $(cat "$1"), not $2"; }
echo libvirts >"$module"
for _ in 1 2; do
    sh /job/divert-module add
    holds "$module" ours
    holds "$module.libvirt" libvirts
done
# An upgrade of libvirt puts its file in the place of the link.
echo newer >"$module.new"
mv "$module.new" "$module"
sh /job/divert-module add
holds "$module" ours
holds "$module.libvirt" newer
for _ in 1 2; do
    sh /job/divert-module remove
    holds "$module" newer
    [ ! -e "$module.libvirt" ] || fail "libvirt's module is there twice"
done
echo "-- passed"
