# The virtual machine's first process, from the job's disk at /mnt: sets up the machine, runs `command` and powers off.
# The first port takes what the command prints, the second its exit status.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
for dir in /dev/shm /run /tmp; do mount -t tmpfs tmp $dir; done
mkdir -p /run/lock /job
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin && ln -s fd/1 /dev/stdout && ln -s fd/2 /dev/stderr
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
modprobe -a virtio_console virtio_rng tun
ip link set lo up
# Files stay on their disk; what is seen of them are links.
cp -rs /mnt/files/. /
cd /job
# The ports come some time after their driver, and have the number of their device in their names.
tries=0
until [ -c /dev/vport*p1 ] && [ -c /dev/vport*p2 ]; do
	[ $((tries += 1)) -lt 100 ] || busybox poweroff -f
	sleep 0.1
done
output=$(echo /dev/vport*p1) status=$(echo /dev/vport*p2)
sh /mnt/command </dev/null >"$output" 2>&1
echo $? >"$status"
busybox poweroff -f
