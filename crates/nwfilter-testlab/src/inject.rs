//! Sending frames as a running domain would: through one more queue of its port.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;

use crate::Host;
use crate::tap::open;

/// A queue of a port that QEMU holds too.
#[derive(Debug)]
pub struct Injector {
    file: File,
}

impl Injector {
    /// Opens a queue of a port that has several, as the ports that libvirt makes for QEMU have.
    pub fn open(host: &Host, port: &str) -> Result<Self> {
        let flags = libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let file =
            host.enter(|| open(port, flags)).with_context(|| format!("cannot open a queue of {port}"))?;
        Ok(Self { file })
    }

    /// Sends a frame as the guest behind the port would.
    ///
    /// QEMU sets how long the header before each frame is, for all queues, when the guest's firmware takes the device. A
    /// frame that was sent with the old length just then is garbled and gets through nowhere, so it is sent again.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
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
}
