//! Sending frames as a running domain would: through one more queue of its port.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nwfilter_testlab::Host;

/// A queue of a port that QEMU holds too.
pub(crate) struct Injector {
    file: File,
}

impl Injector {
    pub(crate) fn open(host: &Host, port: &str) -> Result<Self> {
        host.enter(|| Self::attach(port)).with_context(|| format!("cannot open a queue of {port}"))
    }

    /// Sends a frame as the guest behind the port would.
    ///
    /// QEMU sets how long the header before each frame is, for all queues, when the guest's firmware takes the device. A
    /// frame that was sent with the old length just then is garbled and gets through nowhere, so it is sent again.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        loop {
            let header = self.header_length()?;
            // A virtio header of zeros: nothing is left to the device.
            let packet = [&vec![0; header], frame].concat();
            let sent = (&self.file).write(&packet)?;
            ensure!(sent == packet.len(), "sent {sent} of {} bytes", packet.len());
            if self.header_length()? == header {
                return Ok(());
            }
        }
    }

    fn header_length(&self) -> Result<usize> {
        let mut length: libc::c_int = 0;
        // SAFETY: the descriptor is open, and the kernel writes an int.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETVNETHDRSZ as _, &raw mut length) };
        Errno::result(result).context("TUNGETVNETHDRSZ")?;
        Ok(usize::try_from(length)?)
    }

    fn attach(port: &str) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: all of ifreq is integers and raw pointers, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(port.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open, and the request is an ifreq that outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw const request) };
        Errno::result(result).context("TUNSETIFF")?;
        Ok(Self { file })
    }
}
