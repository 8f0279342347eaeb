//! The network interfaces of the host, in the network namespace of the calling thread.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoPortKind, LinkAttribute, LinkExtentMask, LinkInfo, LinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nwfilter_xml::PortDev;

/// Whether the packets of a port pass its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attachment {
    /// It is in a bridge.
    Bridged,
    /// It is in no bridge: its rules see none of its packets.
    Unbridged,
    /// There is no network interface of that name.
    Absent,
}

/// Queries the kernel for interfaces over rtnetlink.
pub(crate) struct Links(Socket);

impl Links {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self(socket))
    }

    /// Whether the port exists and is in a bridge.
    pub(crate) fn attachment(&self, port: &PortDev) -> io::Result<Attachment> {
        Ok(self.find(port)?.map_or(Attachment::Absent, |link| link.attachment()))
    }

    /// Whether both ports exist and are in the same bridge, or both in none.
    pub(crate) fn are_neighbours(&self, one: &PortDev, other: &PortDev) -> io::Result<bool> {
        Ok(match (self.find(one)?, self.find(other)?) {
            (Some(one), Some(other)) => one.controller == other.controller,
            _ => false,
        })
    }

    fn find(&self, port: &PortDev) -> io::Result<Option<Link>> {
        let name = LinkAttribute::IfName(port.to_string());
        match self.ask(vec![name], NLM_F_REQUEST) {
            // The kernel finds interfaces by alternative names too, by which rules do not match.
            Ok(links) => Ok(links.into_iter().map(|(_, link)| link).find(|link| link.name == port.as_str())),
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every interface by its index.
    pub(crate) fn all(&self) -> io::Result<BTreeMap<u32, Link>> {
        Ok(self.ask(Vec::new(), NLM_F_REQUEST | NLM_F_DUMP)?.into_iter().collect())
    }

    fn ask(&self, mut attributes: Vec<LinkAttribute>, flags: u16) -> io::Result<Vec<(u32, Link)>> {
        attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut link = LinkMessage::default();
        link.attributes = attributes;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(link));
        request.header.flags = flags;
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.0.send(&buffer, 0)?;
        let mut links = Vec::new();
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            for message in messages(&datagram) {
                match message? {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                        links.extend(Link::of(&link));
                    }
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => return Ok(links),
                    _ => (),
                }
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP {
                return Ok(links);
            }
        }
    }
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) is_bridged: bool,
    /// The index of its master, such as a bridge.
    pub(crate) controller: Option<u32>,
}

impl Link {
    /// The interface that a message is about, with its index.
    pub(crate) fn of(message: &LinkMessage) -> Option<(u32, Self)> {
        let name = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })?;
        let is_bridged = message.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::LinkInfo(info) => info.contains(&LinkInfo::PortKind(InfoPortKind::Bridge)),
            _ => false,
        });
        let controller = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        });
        Some((message.header.index, Self { name, is_bridged, controller }))
    }

    fn attachment(&self) -> Attachment {
        if self.is_bridged { Attachment::Bridged } else { Attachment::Unbridged }
    }
}

/// The messages of a datagram, up to the first malformed one.
pub(crate) fn messages<M: NetlinkDeserializable>(
    datagram: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkPayload<M>>> {
    let mut rest = Some(datagram);
    std::iter::from_fn(move || {
        let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
        match NetlinkMessage::deserialize(bytes) {
            Ok(message) => {
                // Messages are aligned to four bytes.
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = bytes.get(length..);
                Some(Ok(message.payload))
            }
            Err(error) => Some(Err(io::Error::new(ErrorKind::InvalidData, error))),
        }
    })
}
