//! The kernel's own word on nf_tables, by netlink: how often its rules were changed.
//!
//! Message types are those of `linux/netfilter/nf_tables.h`, attribute numbers those of its `enum nft_*_attributes`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, send, socket,
};

/// struct nlmsghdr
const HEADER: usize = 16;
/// struct nfgenmsg
const FAMILY_HEADER: usize = 4;
/// struct nlattr
const ATTRIBUTE_HEADER: usize = 4;
/// The kernel puts messages together up to a page or 8 KiB; only one that is longer by itself is longer.
const DATAGRAM: usize = 64 * 1024;

/// NFTA_GEN_ID
const GEN_ID: u16 = 1;

/// The generation of the nf_tables ruleset of the calling thread's network namespace.
///
/// The kernel counts the transactions that it commits, in all tables of all families. A run of a restore tool raises
/// it by one for each table that it changes, also where it makes the table; a part of its input that changes nothing
/// does not count, and what only reads does not either. The legacy variants of the tools do not raise it.
///
/// Needs the right to administer the network (`CAP_NET_ADMIN`).
pub fn generation() -> io::Result<u32> {
    let socket = open(0)?;
    send(socket.as_raw_fd(), &generation_request(), MsgFlags::empty())?;
    let mut buffer = vec![0; DATAGRAM];
    // The kernel answers within the call that asks.
    let (length, _) = recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer)?;
    for message in messages(&buffer[..length]) {
        match message {
            Message::Refused(error) => return Err(io::Error::from_raw_os_error(error)),
            Message::Nftables { kind: libc::NFT_MSG_NEWGEN, attributes, .. } => {
                return number(attributes, GEN_ID).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
            Message::Nftables { .. } => (),
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// A socket that hears the multicast groups of a mask; it does not block.
fn open(groups: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// NFT_MSG_GETGEN
fn generation_request() -> Vec<u8> {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_GETGEN) as u16;
    let mut request = Vec::with_capacity(HEADER + FAMILY_HEADER);
    request.extend(((HEADER + FAMILY_HEADER) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // The sequence number and the sender, which the kernel knows.
    request.extend([0; 8]);
    // Family, version, resource.
    request.extend([libc::AF_UNSPEC as u8, libc::NFNETLINK_V0 as u8, 0, 0]);
    request
}

// ---- messages ----

/// A message of the kernel.
#[derive(Debug, PartialEq, Eq)]
enum Message<'a> {
    /// The request was refused, with an errno.
    Refused(i32),
    /// One of nf_tables.
    Nftables {
        /// `NFT_MSG_*`
        kind: libc::c_int,
        attributes: &'a [u8],
    },
}

/// The messages of a datagram. What is cut off ends it; what is not nf_tables' is left out.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    let next = move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let payload = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    };
    std::iter::from_fn(next).filter_map(|(kind, payload)| {
        if kind == libc::NLMSG_ERROR as u16 {
            return Some(Message::Refused(-i32::from_ne_bytes(*payload.first_chunk()?)));
        }
        let (subsystem, kind) = (libc::c_int::from(kind >> 8), libc::c_int::from(kind & 0xff));
        let attributes = payload.get(FAMILY_HEADER..)?;
        (subsystem == libc::NFNL_SUBSYS_NFTABLES).then_some(Message::Nftables { kind, attributes })
    })
}

/// The value of an attribute.
fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    loop {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        if kind & libc::NLA_TYPE_MASK as u16 == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn number(attributes: &[u8], wanted: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*attribute(attributes, wanted)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute as the kernel writes it, padded.
    fn written(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut attribute = ((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes().to_vec();
        attribute.extend(kind.to_ne_bytes());
        attribute.extend(value);
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    /// A message of nf_tables as the kernel writes it.
    fn message(kind: libc::c_int, family: libc::c_int, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = vec![family as u8, 0, 0, 0];
        payload.extend(attributes.concat());
        let mut message = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        message.extend(((libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16).to_ne_bytes());
        message.extend([0; 10]);
        message.extend(payload);
        message
    }

    #[test]
    fn every_message_of_a_datagram_is_read() {
        let name = written(3, b"iptables\0");
        let first = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[name, written(GEN_ID, &[0, 0, 1, 2])]);
        let mut foreign = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[]);
        foreign[5] = libc::NFNL_SUBSYS_CTNETLINK as u8;
        let datagram = [first.clone(), foreign, first].concat();
        let read: Vec<_> = messages(&datagram).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            let Message::Nftables { kind: libc::NFT_MSG_NEWGEN, attributes, .. } = message else {
                panic!("{message:?}")
            };
            assert_eq!(number(attributes, GEN_ID), Some(0x102));
            assert_eq!(attribute(attributes, 3), Some(&b"iptables\0"[..]));
            assert_eq!(attribute(attributes, 9), None);
        }
    }

    #[test]
    fn a_refusal_is_an_error_number() {
        let mut refused = message(0, 0, &[]);
        refused[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        refused[HEADER..HEADER + 4].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(messages(&refused).collect::<Vec<_>>(), [Message::Refused(libc::EPERM)]);
    }

    #[test]
    fn what_is_cut_or_wrong_is_not_read() {
        let whole = message(libc::NFT_MSG_NEWGEN, libc::AF_UNSPEC, &[written(GEN_ID, &[0, 0, 0, 7])]);
        for length in 0..whole.len() {
            assert_eq!(messages(&whole[..length]).count(), 0, "{length} bytes");
        }
        for length in [0u32, 1, 15, u32::MAX] {
            let mut wrong = whole.clone();
            wrong[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&wrong).count(), 0, "said to be {length} bytes long");
        }
        for length in [0u16, 3, 9, u16::MAX] {
            let mut attributes = written(GEN_ID, &[0, 0, 0, 7]);
            attributes[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(number(&attributes, GEN_ID), None, "said to be {length} bytes long");
        }
    }
}
