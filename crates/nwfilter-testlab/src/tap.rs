//! A tap: a port of the bridge whose every frame the test writes and reads.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Host;
use crate::netns::Netns;

/// How long [`Tap::delivers`] waits before it believes that a frame was dropped. The kernel takes
/// a frame from tap to tap within the call that writes it, so that this is mostly for a busy machine.
const PATIENCE: Duration = Duration::from_millis(150);

/// More than a frame of the interface's 1,500 bytes and its tags are long.
const LONGEST: usize = 2048;

/// A tap device in `br0`, held open until dropped, when the device disappears.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    _netns: Netns,
}

impl Tap {
    pub(crate) fn new(host: &Host, name: &str) -> Result<Self> {
        let file = host.enter(|| open(name, 0)).with_context(|| format!("cannot make the tap {name}"))?;
        host.join_bridge(name)?;
        Ok(Self { file, name: name.into(), _netns: host.netns().clone() })
    }

    /// The name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends a frame, as the guest behind this port would.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = (&self.file).write(frame).with_context(|| format!("cannot send to {}", self.name))?;
        ensure!(sent == frame.len(), "sent {sent} of {} bytes to {}", frame.len(), self.name);
        Ok(())
    }

    /// The next frame for the guest behind this port, or `None` when none comes within `timeout`.
    pub fn recv(&self, timeout: Duration) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(frame) = self.read()? {
                return Ok(Some(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut ready = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            let wait = left + Duration::from_millis(1);
            match poll(&mut ready, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The first frame within `timeout` that the predicate accepts; those before it are dropped.
    pub fn expect(&self, timeout: Duration, accepts: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.recv(left)? {
                Some(frame) if accepts(&frame) => return Ok(Some(frame)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// All frames that wait to be read.
    pub fn drain(&self) -> Result<Vec<Vec<u8>>> {
        std::iter::from_fn(|| self.read().transpose()).collect()
    }

    /// Sends a frame from here and tells whether exactly that frame arrives at the other tap.
    /// Frames that waited at the other tap before are dropped.
    pub fn delivers(&self, to: &Tap, frame: &[u8]) -> Result<bool> {
        to.drain()?;
        self.send(frame)?;
        Ok(to.expect(PATIENCE, |arrived| arrived == frame)?.is_some())
    }

    fn read(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; LONGEST];
        match (&self.file).read(&mut frame) {
            Ok(length) => {
                frame.truncate(length);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read from {}", self.name)),
        }
    }
}

/// Opens a tap in the network namespace of the calling thread, which is made if it does not exist.
pub(crate) fn open(name: &str, flags: libc::c_int) -> Result<File> {
    ensure!(!name.is_empty() && name.len() < libc::IFNAMSIZ, "bad name {name:?}");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: all of ifreq is integers and raw pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as libc::c_short;
    // SAFETY: the descriptor is open, and the request is an ifreq that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw const request) };
    Errno::result(result).context("TUNSETIFF")?;
    Ok(file)
}
