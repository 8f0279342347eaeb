//! A socket that captures the few frames of one port from which addresses can be learned. The kernel drops the others.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

use super::bpf::SocketFilter;
use super::packets::{Heading, MAX_FRAME};

/// The size of a port's receive buffer in bytes, which the kernel doubles. Frames that do not fit are dropped.
const BUFFER: libc::c_int = 32 * 1024;
/// A capturing socket, bound to one port in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Capture {
    socket: OwnedFd,
    index: u32,
}

impl Capture {
    /// Starts to capture the frames of an interface that the program accepts.
    pub(crate) fn open(index: u32, program: &SocketFilter) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: a bare system call. Protocol 0 captures nothing until the socket is bound.
        let descriptor = checked(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let capture = Self { socket, index };
        capture.set(libc::SO_ATTACH_BPF, &program.as_fd().as_raw_fd())?;
        capture.set(libc::SO_RCVBUF, &BUFFER)?;
        capture.bind()?;
        Ok(capture)
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    fn set<T>(&self, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the pointer and length are those of a value that outlives the call.
        checked(unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), libc::SOL_SOCKET, option, value, length)
        })?;
        Ok(())
    }

    fn bind(&self) -> io::Result<()> {
        let mut address = empty_address();
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = self.index.cast_signed();
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the pointer and length are those of an address that outlives the call.
        checked(unsafe { libc::bind(self.socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), length) })?;
        Ok(())
    }

    /// Reads the next frame into `buffer` and returns its length there; a longer frame is cut. `None` if there is none.
    pub(crate) fn next(&self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<(Heading, usize)>> {
        let mut address = empty_address();
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both pointers are to values that outlive the call, with their lengths.
        let received = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
                std::ptr::from_mut(&mut address).cast(),
                &raw mut length,
            )
        };
        match usize::try_from(received) {
            Ok(received) => {
                let outgoing = address.sll_pkttype == libc::PACKET_OUTGOING;
                let heading = if outgoing { Heading::ToGuest } else { Heading::FromGuest };
                Ok(Some((heading, received)))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn empty_address() -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: 0,
        sll_protocol: 0,
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}
