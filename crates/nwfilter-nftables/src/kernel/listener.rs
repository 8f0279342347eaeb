//! A netlink socket that messages of the kernel come to unasked.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;

use super::connection::{receive_buffer, receive_now};
use super::error::Error;
use super::wire::{Message, messages};

/// The size of the buffer at first, in bytes.
const DATAGRAM: usize = 64 << 10;

/// Receives messages, from its opening on.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: Socket,
    pub(super) buffer: Vec<u8>,
}

/// What a listener receives.
pub(super) enum Heard<'a> {
    /// A message.
    Message(Message<'a>),
    /// More messages came than could wait.
    Missed,
}

impl Listener {
    /// Listens to groups, given as bits, in the network namespace of the calling thread. `backlog` bytes of messages may wait.
    pub(super) fn open(groups: u32, backlog: usize) -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        receive_buffer(&socket, backlog)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket, buffer: vec![0; DATAGRAM] })
    }

    /// Takes what has come, in its order. Does not wait.
    pub(super) fn receive(
        &mut self,
        mut take: impl FnMut(Heard<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        loop {
            match receive_now(&self.socket, &mut self.buffer) {
                Ok(Some(len)) => {
                    for message in messages(&self.buffer[..len]) {
                        take(Heard::Message(message?))?;
                    }
                }
                Ok(None) => return Ok(()),
                Err(error) if is_overrun(&error) => take(Heard::Missed)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
