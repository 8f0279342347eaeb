# Runs /job/run in a copy of a system that is thrown away, with a network of its own. In a mount and network namespace of its own.
#   chroot.sh SYSTEM PLACE JOB       SYSTEM: a directory, or the image of a file system; PLACE: an empty directory; JOB: /job there
set -eu
system=$1 place=$2 job=$3
mount --make-rprivate /
mount -t tmpfs tmpfs "$place"
mkdir "$place/system" "$place/changes" "$place/work" "$place/root"
if [ -d "$system" ]; then
    lower=$system
else
    mount -o loop,ro,noload "$system" "$place/system"
    lower=$place/system
fi
root=$place/root
mount -t overlay -o "lowerdir=$lower,upperdir=$place/changes,workdir=$place/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/job" "$root/run/lock"
mount --bind "$job" "$root/job"
ip link set lo up
export HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec chroot "$root" sh -eu /job/run
