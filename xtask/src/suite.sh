# Makes a chroot of a Debian suite with libvirt (build), or runs commands in one (run). In a mount namespace of its own.
#   suite.sh build CHROOT SUITE MIRROR PACKAGE...
#   suite.sh run CHROOT JOB          the directory JOB is /job in the chroot, and /job/run is run there
set -eu
action=$1 root=$2
shift 2
mount --make-rprivate /

enter() {
    # A mount, because programs in it change how mounts below / propagate.
    mount --bind "$root" "$root"
    mount --rbind /proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
}

case $action in
build)
    suite=$1 mirror=$2
    shift 2
    debootstrap --variant=minbase "$suite" "$root" "$mirror"
    enter
    # No service starts in a chroot.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    # A mirror of the unstable suite that is some days old is as good.
    apt="apt-get --quiet --yes --option Acquire::Check-Valid-Until=false"
    chroot "$root" $apt update
    chroot "$root" $apt install --no-install-recommends "$@"
    chroot "$root" apt-get clean
    ;;
run)
    mkdir -p "$root/job"
    enter
    mount --bind "$1" "$root/job"
    cd /
    exec chroot "$root" /job/run
    ;;
esac
