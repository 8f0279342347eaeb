//! Watches the network interfaces of the host over rtnetlink.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use crate::links::{Link, Links, messages};

/// The multicast group of changes of interfaces, `RTNLGRP_LINK`.
const LINK_GROUP: u32 = 1;
/// Size of the receive buffer. If it overflows, the kernel reports it.
const BACKLOG: usize = 4 << 20;

/// A change of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkChange {
    /// An interface of this name is new, or was added to a bridge.
    Ready(String),
    /// An interface was renamed.
    Renamed { from: String, to: String },
}

/// Watches interfaces.
pub(crate) struct LinkWatch {
    socket: Socket,
    known: BTreeMap<u32, Link>,
}

impl LinkWatch {
    /// Watches from now on.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_rx_buf_sz(BACKLOG)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, known: Links::open()?.all()? })
    }

    /// The changes since the last call. Does not block.
    pub(crate) fn changes(&mut self) -> io::Result<Vec<LinkChange>> {
        let mut changes = Vec::new();
        loop {
            match self.socket.recv_from_full() {
                Ok((datagram, sender)) if sender.port_number() == 0 => {
                    messages(&datagram).for_each(|message| match message {
                        Ok(message) => changes.extend(self.take(&message)),
                        Err(error) => log::debug!("a message about an interface is not understood: {error}"),
                    });
                }
                Ok(_) => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(changes),
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    changes.extend(self.catch_up()?);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, message: &NetlinkPayload<RouteNetlinkMessage>) -> Option<LinkChange> {
        // A bridge also sends messages of its own family about its ports.
        let is_about = |link: &LinkMessage| link.header.interface_family == AddressFamily::Unspec;
        match message {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) if is_about(link) => {
                let (index, link) = Link::of(link)?;
                self.put(index, link)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) if is_about(link) => {
                self.known.remove(&link.header.index);
                None
            }
            _ => None,
        }
    }

    fn put(&mut self, index: u32, new: Link) -> Option<LinkChange> {
        let change = match self.known.get(&index) {
            Some(old) if old.name != new.name => {
                Some(LinkChange::Renamed { from: old.name.clone(), to: new.name.clone() })
            }
            Some(old) if old.is_bridged || !new.is_bridged => None,
            _ => Some(LinkChange::Ready(new.name.clone())),
        };
        self.known.insert(index, new);
        change
    }

    /// Compares all interfaces after notifications were lost.
    fn catch_up(&mut self) -> io::Result<Vec<LinkChange>> {
        let now = Links::open()?.all()?;
        self.known.retain(|index, _| now.contains_key(index));
        Ok(now.into_iter().filter_map(|(index, link)| self.put(index, link)).collect())
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nwfilter_testlab::{Host, Need, skip_unless};

    use super::*;

    #[test]
    fn changes_that_overflowed_the_queue_of_reports_are_found() {
        skip_unless!(Need::Root);
        let host = Host::new().unwrap();
        host.ip(&["tuntap add dev old mode tap", "tuntap add dev gone mode tap"]).unwrap();
        let mut watch = host.enter(LinkWatch::open).unwrap();
        watch.socket.set_rx_buf_sz(4096_u32).unwrap();
        let names: Vec<_> = (0..100).map(|number| format!("new{number}")).collect();
        let add = names.iter().map(|name| format!("tuntap add dev {name} mode tap"));
        host.ip(&add.collect::<Vec<_>>()).unwrap();
        host.ip(&["link del gone", "link set old name renamed"]).unwrap();
        let changes = host.enter(|| watch.changes()).unwrap();
        for name in names {
            assert!(changes.contains(&LinkChange::Ready(name.clone())), "{name} is not among {changes:?}");
        }
        assert!(changes.contains(&LinkChange::Renamed { from: "old".into(), to: "renamed".into() }));
        assert!(!watch.known.values().any(|link| link.name == "gone"));
        assert_eq!(host.enter(|| watch.changes()).unwrap(), []);
    }
}
