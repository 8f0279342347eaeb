//! The contents of ipsets and of sets of the store, as the caller gives them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use nwfilter_rules::{Network, SetContent};
use nwfilter_xml::value::SetDirection;
use nwfilter_xml::{MacAddr, SetFamily, SetName, SetRange};

use crate::compare::is_in_network;
use crate::packet::{Ip, Packet};
use crate::words;

/// The ipsets and the sets of the store that rules match against. A packet that meets a missing one cannot be decided.
#[derive(Clone, Debug, Default)]
pub struct IpSets {
    of_host: BTreeMap<String, Vec<Vec<Part>>>,
    of_store: BTreeMap<SetName, Arc<SetContent>>,
}

/// One dimension of an element.
#[derive(Clone, Debug)]
enum Part {
    Network(Network),
    Port { protocol: u8, port: u16 },
    Mac(MacAddr),
}

/// An element that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no element of an ipset: write it as 'ipset add' takes it, as 10.0.0.0/24 or 10.0.0.2,tcp:80"
)]
pub struct NoElement(String);

impl IpSets {
    /// Adds an element, as `ipset add` takes it: addresses, networks, ports and MAC addresses, separated by commas. An
    /// empty text makes the set without adding anything.
    pub fn add(&mut self, set: &str, element: &str) -> Result<(), NoElement> {
        let elements = self.of_host.entry(set.to_owned()).or_default();
        if !element.is_empty() {
            let parts = element.split(',').map(part).collect::<Option<_>>();
            elements.push(parts.ok_or_else(|| NoElement(element.to_owned()))?);
        }
        Ok(())
    }

    /// Gives the content of a set of the store.
    pub fn hold(&mut self, set: SetName, content: Arc<SetContent>) {
        self.of_store.insert(set, content);
    }

    /// Whether an address or a port of a packet is in a set of the store. `None` if the contents are unknown.
    pub(crate) fn holds(
        &self,
        set: &SetName,
        family: SetFamily,
        direction: SetDirection,
        packet: &Packet,
        ip: &Ip,
    ) -> Option<bool> {
        let content = self.of_store.get(set)?;
        Some(set_value(family, direction, packet, ip).is_some_and(|value| content.covers(value)))
    }

    /// Whether a packet is in a set. `None` if the contents are unknown.
    pub(crate) fn contains(
        &self,
        set: &str,
        directions: &[SetDirection],
        packet: &Packet,
        ip: &Ip,
    ) -> Option<bool> {
        let elements = self.of_host.get(set)?;
        let is_source = |direction: &SetDirection| *direction == SetDirection::Src;
        let holds = |part: &Part, direction: &SetDirection| match part {
            Part::Network(network) => {
                is_in_network(if is_source(direction) { ip.src } else { ip.dst }, network)
            }
            Part::Port { protocol, port } => {
                let found = ip.ports().map(|(src, dst)| if is_source(direction) { src } else { dst });
                found == Some(*port) && *protocol == ip.protocol
            }
            Part::Mac(addr) => *addr == if is_source(direction) { packet.src_mac } else { packet.dst_mac },
        };
        // A set of more dimensions than a rule names matches nothing.
        let is_it = |parts: &Vec<Part>| {
            parts.len() <= directions.len()
                && parts.iter().zip(directions).all(|(part, way)| holds(part, way))
        };
        Some(elements.iter().any(is_it))
    }
}

/// What of a packet is looked for in a set: an address, or a port of TCP or UDP.
pub(crate) fn set_value(
    family: SetFamily,
    direction: SetDirection,
    packet: &Packet,
    ip: &Ip,
) -> Option<SetRange> {
    let is_source = direction == SetDirection::Src;
    match family {
        SetFamily::Ipv4 | SetFamily::Ipv6 => Some(SetRange::of_ip(if is_source { ip.src } else { ip.dst })),
        SetFamily::Mac => Some(SetRange::of_mac(if is_source { packet.src_mac } else { packet.dst_mac })),
        SetFamily::Port => {
            let (src, dst) = ip.ports()?;
            let port = u128::from(if is_source { src } else { dst });
            SetRange::new(family, port, port)
        }
    }
}

fn part(text: &str) -> Option<Part> {
    if let Ok(addr) = text.parse::<MacAddr>() {
        return Some(Part::Mac(addr));
    }
    if let Ok(port) = text.parse() {
        return Some(Part::Port { protocol: crate::packet::protocol::TCP, port });
    }
    if let Some((protocol, port)) = text.split_once(':')
        && let (Some(protocol), Ok(port)) = (words::protocol_number(protocol), port.parse())
    {
        return Some(Part::Port { protocol, port });
    }
    let (addr, prefix) = match text.split_once('/') {
        Some((addr, prefix)) => (addr, Some(prefix.parse().ok()?)),
        None => (text, None),
    };
    Some(Part::Network(Network { addr: addr.parse::<IpAddr>().ok()?, prefix }))
}
