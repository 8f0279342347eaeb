//! Which bridge a port is in, in the network namespace of the calling thread.

use std::collections::BTreeMap;
use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nwfilter_xml::PortDev;

use crate::kernel::expr::IFNAMSIZ;
use crate::kernel::field;

/// The name of a bridge as registers hold it.
pub(crate) type Bridge = [u8; IFNAMSIZ];

/// The bridges of ports; none of ports that are in no bridge, or of which the kernel does not say.
pub(crate) fn of<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> BTreeMap<&'a PortDev, Bridge> {
    let mut names = BTreeMap::new();
    let Ok(socket) = open() else { return BTreeMap::new() };
    let bridge = |port| Some((port, bridge(&socket, port, &mut names).ok().flatten()?));
    ports.into_iter().filter_map(bridge).collect()
}

/// The bridge of the first of these ports that is in one.
pub(crate) fn first_of<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> Option<Bridge> {
    let socket = open().ok()?;
    ports.into_iter().find_map(|port| bridge(&socket, port, &mut BTreeMap::new()).ok().flatten())
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The bridge of a port. `names` are those of the interfaces that were asked for.
fn bridge(
    socket: &Socket,
    port: &PortDev,
    names: &mut BTreeMap<u32, Option<Bridge>>,
) -> io::Result<Option<Bridge>> {
    let mut by_name = LinkMessage::default();
    by_name.attributes.push(LinkAttribute::IfName(port.to_string()));
    let Some(link) = ask(socket, by_name)? else { return Ok(None) };
    let controller = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    });
    let Some(controller) = controller else { return Ok(None) };
    if let Some(known) = names.get(&controller) {
        return Ok(*known);
    }
    let mut by_index = LinkMessage::default();
    by_index.header.index = controller;
    let attributes = ask(socket, by_index)?.map(|link| link.attributes).unwrap_or_default();
    let name = attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => field::ifname(name),
        _ => None,
    });
    names.insert(controller, name);
    Ok(name)
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
