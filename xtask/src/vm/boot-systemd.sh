# The virtual machine's first process, from the job's disk at /mnt: has systemd run `command` when all its services have started,
# and power off. The first port takes what the command prints, the second its exit status.
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /job /run/systemd/system/multi-user.target.wants
# Files stay on their disk; what is seen of them are links.
cp -rs /mnt/files/. /
cat >/run/systemd/system/job.service <<UNIT
[Unit]
Description=The job
After=multi-user.target
[Service]
Type=exec
Environment=HOME=/root
WorkingDirectory=/job
ExecStartPre=modprobe -a virtio_console virtio_rng tun
ExecStartPre=udevadm settle
ExecStart=sh -c 'sh /mnt/command </dev/null >"\$(echo /dev/vport*p1)" 2>&1; echo \$? >"\$(echo /dev/vport*p2)"'
ExecStopPost=systemctl --no-block poweroff --force
UNIT
ln -s ../job.service /run/systemd/system/multi-user.target.wants/job.service
exec /lib/systemd/systemd
