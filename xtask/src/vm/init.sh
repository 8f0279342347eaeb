#!/bin/busybox sh
# The initramfs's first program: mounts the root image and the job's disk, and hands over to the job's `boot`.
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "$module"; done </modules/order
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount -t ext4 /dev/vdb /root/mnt
exec /bin/busybox switch_root /root /bin/sh /mnt/boot
