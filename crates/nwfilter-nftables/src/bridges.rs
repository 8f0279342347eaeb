//! Which bridge a port is in, in the network namespace of the calling thread.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nwfilter_xml::PortDev;

use crate::kernel::expr::IFNAMSIZ;
use crate::kernel::field;

/// The name of the bridge of the first of these ports that is in one, as registers hold it; `None` if none of them is, or the
/// kernel does not say.
pub(crate) fn first_of<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> Option<[u8; IFNAMSIZ]> {
    let mut socket = Socket::new(NETLINK_ROUTE).ok()?;
    socket.bind_auto().ok()?;
    ports.into_iter().find_map(|port| bridge(&socket, port).ok().flatten())
}

fn bridge(socket: &Socket, port: &PortDev) -> io::Result<Option<[u8; IFNAMSIZ]>> {
    let mut by_name = LinkMessage::default();
    by_name.attributes.push(LinkAttribute::IfName(port.to_string()));
    let Some(link) = ask(socket, by_name)? else { return Ok(None) };
    let controller = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    });
    let Some(controller) = controller else { return Ok(None) };
    let mut by_index = LinkMessage::default();
    by_index.header.index = controller;
    let Some(link) = ask(socket, by_index)? else { return Ok(None) };
    Ok(link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => field::ifname(name),
        _ => None,
    }))
}

/// The interface that a message describes; `None` if there is no such.
fn ask(socket: &Socket, mut link: LinkMessage) -> io::Result<Option<LinkMessage>> {
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(link));
    request.header.flags = NLM_F_REQUEST;
    request.finalize();
    let mut buffer = vec![0; request.buffer_len()];
    request.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::deserialize(&answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Some(link),
        _ => None,
    })
}
