//! Ends connections that new rules refuse, though rules on established connections would let them go on.
//!
//! Each connection of a port is evaluated by the port's new rules, as nwfilter-explain does, in three questions: do its
//! packets pass now, as those of an established connection; would its first packet pass; could it be taken up again in
//! the middle. One whose packets do not pass now is left alone: it has ended, and the kernel could only take it up again
//! if it forgot it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use nwfilter_explain::{
    Connection, Explainer, Icmp, Ip, IpSets, Packet, State, Tcp, Transport, Way, protocol, tcp_flag,
};
use nwfilter_rules::{CtDirection, Ethernet, IpTest, Ruleset, sets_of};
use nwfilter_xml::{MacAddr, PortDev};
use serde::Serialize;

use crate::conntrack::{Conntrack, Ending, Entry, Flow, is_loose};
use crate::learn::wanted::{Past, addresses};
use crate::sets::{Members, Sets, content};
use crate::stores::Stores;
use crate::transaction::{Committed, Concerned};
use crate::{Driver, Error};

/// How many connections of the host's table are read for one transaction.
pub const MAX_CONNECTIONS: usize = 1 << 20;

/// The connections that a transaction ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// The connections, sorted by port.
    pub ended: Vec<CutConnection>,
    /// Why others may go on that the rules refuse. The change itself is in force.
    pub failures: Vec<CutFailure>,
}

/// A connection that was ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct CutConnection {
    /// The port whose rules refuse it.
    pub port: PortDev,
    /// The connection, from the end that opened it.
    #[serde(flatten)]
    pub flow: Flow,
    /// How it was ended.
    pub ending: Ending,
}

/// Why connections that the rules refuse may go on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum CutFailure {
    /// Nothing is known of any connection, or of a port.
    #[error("connections were not ended: {why}")]
    Unavailable {
        /// Why, and what to do.
        why: String,
    },
    /// The host has more connections than are read.
    #[error("only {MAX_CONNECTIONS} of the host's connections were looked at: there are more")]
    TooMany,
    /// The addresses of a port's guest are not known, so neither are its connections.
    #[error(
        "port '{port}': its connections are not known, because its guest's address is not: give it as IP or IPV6"
    )]
    NoAddress {
        /// The port.
        port: PortDev,
    },
    /// Connections of guests with the same address on different bridges cannot be told apart.
    #[error(
        "port '{port}': the guest of port '{other}' on another bridge has {address}, too, and their connections cannot be told apart"
    )]
    SharedAddress {
        /// The port.
        port: PortDev,
        /// The other port.
        other: PortDev,
        /// The address.
        address: IpAddr,
    },
    /// Whether rules refuse a connection depends on what the kernel does not say of it.
    #[error("port '{port}': whether its rules refuse connections is not known: {why}")]
    Undecided {
        /// The port.
        port: PortDev,
        /// The rule, and what it asks for.
        why: String,
    },
    /// The kernel did not end a connection.
    #[error("port '{port}': {flow} was not ended: {why}")]
    Refused {
        /// The port.
        port: PortDev,
        /// The connection.
        flow: Flow,
        /// What the kernel said.
        why: String,
    },
}

/// `vnet0: tcp 192.0.2.7:40000 → 10.0.0.2:22`, and `, stalled` where it is
impl fmt::Display for CutConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.port, self.flow)?;
        f.write_str(if self.ending == Ending::Stalled { ", stalled" } else { "" })
    }
}

impl Driver {
    /// Ends the connections of the ports that a transaction concerned, if it asked for that.
    pub(crate) fn cut(&self, mut committed: Committed) -> Committed {
        if let Some(concerned) = committed.concerned.take()
            && self.host().is_kernel()
        {
            let cut = self.inside(|| self.cut_inside(&concerned));
            committed.cut = cut.unwrap_or_else(|error| Cut {
                ended: Vec::new(),
                failures: vec![CutFailure::Unavailable { why: crate::with_causes(&error) }],
            });
        }
        committed
    }

    fn cut_inside(&self, concerned: &Concerned) -> Result<Cut, Error> {
        let stores = self.look()?;
        let mut failures = BTreeSet::new();
        let mut ports = PortRules::of(&stores, concerned, &mut failures);
        self.place(&stores, &mut ports, &mut failures)?;
        if ports.is_empty() {
            return Ok(Cut { ended: Vec::new(), failures: failures.into_iter().collect() });
        }
        let local = local_addresses();
        let mut by_address: HashMap<IpAddr, Vec<&PortRules>> = HashMap::new();
        for port in &ports {
            port.addresses.iter().for_each(|address| by_address.entry(*address).or_default().push(port));
        }
        let concerns = |entry: &Entry| {
            let ends = [entry.original.source, entry.original.destination];
            let ports = ends.into_iter().filter_map(|end| by_address.get(&end)).flatten();
            ports.copied().filter_map(|port| Some((port, port.way_of(entry, &local)?))).collect::<Vec<_>>()
        };
        let read = Conntrack::open().and_then(|mut conntrack| {
            let (entries, all) = conntrack.read(MAX_CONNECTIONS, |entry| !concerns(entry).is_empty())?;
            Ok((conntrack, entries, all))
        });
        let (conntrack, mut entries, all) = match read {
            Ok(read) => read,
            Err(error) => {
                let why = format!("the kernel's table of connections cannot be read: {error}");
                failures.insert(CutFailure::Unavailable { why });
                return Ok(Cut { ended: Vec::new(), failures: failures.into_iter().collect() });
            }
        };
        if !all {
            failures.insert(CutFailure::TooMany);
        }
        let is_loose = is_loose();
        // Whether a connection that another one announced may go on depends on the other one.
        entries.sort_by_key(|entry| (entry.master.is_some(), entry.original));
        let (mut ended, mut gone) = (BTreeSet::new(), HashSet::new());
        for entry in &entries {
            let is_announced = match &entry.master {
                Some(master) => !gone.contains(&(entry.zone, *master)),
                None => entry.is_expected,
            };
            for (port, way) in concerns(entry) {
                let ending = match port.judge(entry, way, is_announced, is_loose) {
                    Judgement::Leave => continue,
                    Judgement::End(ending) => ending,
                    Judgement::Undecided(why) => {
                        failures.insert(CutFailure::Undecided { port: port.port.clone(), why });
                        continue;
                    }
                };
                let (port, flow) = (port.port.clone(), entry.original);
                match conntrack.end(entry, ending) {
                    Ok(true) => {
                        gone.insert((entry.zone, flow));
                        ended.insert(CutConnection { port, flow, ending });
                    }
                    Ok(false) => {}
                    Err(error) => {
                        failures.insert(CutFailure::Refused { port, flow, why: error.to_string() });
                    }
                }
                break;
            }
        }
        Ok(Cut { ended: ended.into_iter().collect(), failures: failures.into_iter().collect() })
    }

    /// Finds the conntrack zones of ports. Leaves those out whose connections cannot be told from others'.
    fn place(
        &self,
        stores: &Stores,
        ports: &mut Vec<PortRules>,
        failures: &mut BTreeSet<CutFailure>,
    ) -> Result<(), Error> {
        let wanted: HashSet<IpAddr> = ports.iter().flat_map(|port| port.addresses.iter().copied()).collect();
        let mut having: BTreeMap<IpAddr, Vec<&PortDev>> = BTreeMap::new();
        for binding in stores.bindings.documents() {
            for address in addresses(&stores.known, binding, Past::Counts) {
                if wanted.contains(&address) {
                    having.entry(address).or_default().push(&binding.port);
                }
            }
        }
        let all = having.values().flatten().map(|port| (*port).clone());
        let zones = self.backend().connection_zones(&all.collect())?;
        let links = crate::links::Links::open().map_err(|source| Error::Links { source })?;
        ports.retain_mut(|port| {
            // Packets of a port in no bridge do not meet its rules.
            let Some(zone) = zones.get(&port.port) else { return false };
            port.zone = *zone;
            for address in &port.addresses {
                for other in having.get(address).into_iter().flatten().filter(|other| ***other != port.port) {
                    if links.are_neighbours(&port.port, other).unwrap_or(false) {
                        continue;
                    }
                    port.with_host = false;
                    if zones.get(*other).is_none_or(|other| other == zone) {
                        failures.insert(CutFailure::SharedAddress {
                            port: port.port.clone(),
                            other: (*other).clone(),
                            address: *address,
                        });
                        return false;
                    }
                }
            }
            true
        });
        Ok(())
    }
}

/// A port, with what decides about its connections.
#[derive(Debug)]
struct PortRules {
    port: PortDev,
    /// Its rules on IP packets. Those on Ethernet frames do not know connections: what they refuse has ended.
    ruleset: Ruleset,
    sets: IpSets,
    mac: MacAddr,
    addresses: BTreeSet<IpAddr>,
    /// The zone of its bridge.
    zone: u16,
    /// Whether connections with the host are surely its own.
    with_host: bool,
}

/// What is to become of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judgement {
    Leave,
    End(Ending),
    Undecided(String),
}

impl PortRules {
    fn of(stores: &Stores, concerned: &Concerned, failures: &mut BTreeSet<CutFailure>) -> Vec<Self> {
        let (filters, members) = (stores.filter_map(), Members::of(stores));
        let rules = |binding: &std::sync::Arc<nwfilter_xml::Binding>| {
            // One that cannot have its rules is reported by what tried to give it them.
            let ruleset = stores.ruleset(&filters, binding).ok()?;
            let asked: BTreeSet<_> = sets_of(&ruleset).map(|(name, _)| name.clone()).collect();
            if !concerned.ports.contains(&binding.port) && asked.is_disjoint(&concerned.sets) {
                return None;
            }
            let mut sets = IpSets::default();
            for name in asked {
                let held = stores.set(&name).and_then(|set| content(stores, &members, set).ok());
                sets.hold(name, std::sync::Arc::new(held?));
            }
            let addresses: BTreeSet<_> =
                addresses(&stores.known, binding, Past::Counts).into_iter().collect();
            if !asks_for_connections(&ruleset) {
                return None;
            }
            if addresses.is_empty() {
                failures.insert(CutFailure::NoAddress { port: binding.port.clone() });
            }
            let ruleset = Ruleset { ethernet: Ethernet::default(), ..ruleset };
            let (port, mac) = (binding.port.clone(), binding.mac);
            Some(Self { port, ruleset, sets, mac, addresses, zone: 0, with_host: true })
        };
        let ports = stores.bindings.documents().filter_map(rules);
        ports.filter(|port| !port.addresses.is_empty()).collect()
    }

    /// The way of the first packet of a connection through this port; `None` if it does not go there.
    fn way_of(&self, entry: &Entry, local: &BTreeSet<IpAddr>) -> Option<Way> {
        let Flow { source, destination, .. } = entry.original;
        // It ends at the host, or the host translates its source: then the host's stack sees it, whose zone is 0.
        let with_host = local.contains(&destination) || entry.reply.destination != source;
        // What the host itself sends does not meet rules on IP packets, and where it translates the destination, it sends.
        let from_host = local.contains(&source) || entry.reply.source != destination;
        let is_near = entry.zone == self.zone || entry.zone == 0 && with_host;
        if !is_near || with_host && !self.with_host {
            return None;
        }
        if self.addresses.contains(&source) {
            Some(Way::FromGuest)
        } else if self.addresses.contains(&destination) && !from_host {
            Some(Way::ToGuest)
        } else {
            None
        }
    }

    fn judge(&self, entry: &Entry, way: Way, is_announced: bool, is_loose: bool) -> Judgement {
        match self.ending(entry, way, is_announced, is_loose) {
            Ok(None) => Judgement::Leave,
            Ok(Some(ending)) => Judgement::End(ending),
            Err(why) => Judgement::Undecided(why),
        }
    }

    /// How a connection must be ended; `None` if it may go on, or has ended.
    fn ending(
        &self,
        entry: &Entry,
        way: Way,
        is_announced: bool,
        is_loose: bool,
    ) -> Result<Option<Ending>, String> {
        use CtDirection::{Original, Reply};
        let back = match way {
            Way::FromGuest => Way::ToGuest,
            Way::ToGuest => Way::FromGuest,
        };
        let begins = if is_announced { State::Related } else { State::New };
        let (first, next, answer) =
            (packet(&entry.original, true), packet(&entry.original, false), packet(&entry.answer(), false));
        if self.passes(way, &first, Connection::new(begins, Original))?
            || !self.passes(way, &next, Connection::new(State::Established, Original))?
                && !self.passes(back, &answer, Connection::new(State::Established, Reply))?
        {
            return Ok(None);
        }
        let is_taken_up = is_loose
            && entry.original.protocol == protocol::TCP
            && (self.passes(way, &next, Connection::new(State::New, Original))?
                || self.passes(back, &answer, Connection::new(State::New, Original))?);
        Ok(Some(if is_taken_up { Ending::Stalled } else { Ending::Forgotten }))
    }

    fn passes(&self, way: Way, ip: &Ip, connection: Connection) -> Result<bool, String> {
        let (src, dst) = match way {
            Way::FromGuest => (self.mac, PEER_MAC),
            Way::ToGuest => (PEER_MAC, self.mac),
        };
        let mut explainer = Explainer::new(&self.ruleset).with_sets(self.sets.clone());
        let explained = explainer
            .explain_as(way, &Packet::ip(src, dst, ip.clone()), connection)
            .map_err(|error| error.to_string())?;
        for step in &explained.steps {
            let unknown = step.tests.iter().find(|tested| is_unknown(tested.field, way));
            let others = step.tests.iter().filter(|tested| !is_unknown(tested.field, way));
            if let Some(tested) = unknown
                && others.into_iter().all(|tested| tested.holds)
            {
                return Err(format!("{} asks for the {} of packets", step.origin, tested.field));
            }
        }
        Ok(explained.passes())
    }
}

/// Whether rules can let packets of a connection pass that may not begin it.
fn asks_for_connections(ruleset: &Ruleset) -> bool {
    let parts = ruleset.ipv4.iter().chain(&ruleset.ipv6);
    let mut rules = parts.flat_map(|part| part.from_guest.iter().chain(&part.to_guest));
    rules.any(|rule| {
        let mut tests = rule.matches.iter().map(|m| &m.test);
        tests.any(|test| matches!(test, IpTest::States(_) | IpTest::CtDirection(_)))
    })
}

/// In the place of the other end's MAC address, which conntrack does not know.
const PEER_MAC: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x01]);

/// Whether a field of a packet is not what conntrack knows of its connection.
fn is_unknown(field: &str, way: Way) -> bool {
    match field {
        "source MAC" => way == Way::ToGuest,
        "destination MAC" => way == Way::FromGuest,
        other => matches!(other, "DSCP" | "TCP options" | "number of connections"),
    }
}

/// A packet of a connection: its first one, or one in the middle.
fn packet(flow: &Flow, is_first: bool) -> Ip {
    let (src, dst) = flow.ports.unwrap_or_default();
    let transport = match (flow.protocol, flow.icmp) {
        (protocol::TCP, _) => {
            let flags = if is_first { tcp_flag::SYN } else { tcp_flag::ACK };
            Transport::Tcp(Tcp { src, dst, flags, ..Tcp::default() })
        }
        (_, Some((kind, code, id))) => Transport::Icmp(Icmp { kind, code, id, about: None }),
        _ if flow.ports.is_some() => Transport::Ports { src, dst, payload: Vec::new() },
        _ => Transport::Other,
    };
    Ip::new(flow.source, flow.destination, flow.protocol, transport)
}

/// The addresses of the host, in the network namespace of the calling thread.
fn local_addresses() -> BTreeSet<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    };
    interfaces.filter_map(address).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test fails by panicking.
mod tests {
    use super::*;
    use crate::conntrack::tests::entry;

    const HOST: &str = "10.0.0.1";

    /// A port in zone 7 with the guest 10.0.0.2, whose rules let established connections go on.
    fn port(rules: &str) -> PortRules {
        let filter = format!(
            "<filter name='f'><rule action='accept' direction='inout' priority='100'><all state='ESTABLISHED'/></rule>
             {rules}<rule action='drop' direction='inout' priority='900'><all/></rule></filter>"
        );
        let filter = nwfilter_xml::read_filter("f.xml", &filter).into_result().unwrap();
        let binding = nwfilter_xml::Binding::builder()
            .owner("vm", nwfilter_xml::Uuid::from_u128(1))
            .port("p0")
            .mac("52:54:00:7b:35:93")
            .filter("f")
            .build()
            .unwrap();
        let filters = BTreeMap::from([(filter.name.clone(), filter)]);
        PortRules {
            ruleset: nwfilter_rules::instantiate(&filters, &binding).unwrap(),
            port: binding.port,
            sets: IpSets::default(),
            mac: binding.mac,
            addresses: BTreeSet::from(["10.0.0.2".parse().unwrap()]),
            zone: 7,
            with_host: true,
        }
    }

    fn judged(port: &PortRules, entry: &Entry, is_announced: bool) -> Option<Judgement> {
        let way = port.way_of(entry, &BTreeSet::from([HOST.parse().unwrap()]))?;
        Some(port.judge(entry, way, is_announced, true))
    }

    const SSH: &str = "<rule action='accept' direction='in'><tcp dstportstart='22' state='NEW'/></rule>";
    const OPENS: &str = "<rule action='accept' direction='out'><all state='NEW'/></rule>";

    #[test]
    fn only_what_could_not_begin_is_ended_and_what_could_be_taken_up_is_stalled() {
        use Judgement::{End, Leave};
        let (tcp, udp) = (protocol::TCP, protocol::UDP);
        let to = |protocol, port: u16| entry(protocol, 7, "10.0.0.9:1000", &format!("10.0.0.2:{port}"));
        let of = |protocol, port: u16| entry(protocol, 7, "10.0.0.2:1000", &format!("10.0.0.9:{port}"));
        for (rules, entry, expected) in [
            (SSH.to_owned(), to(tcp, 22), Leave),
            (SSH.to_owned(), to(tcp, 80), End(Ending::Forgotten)),
            (SSH.to_owned(), of(tcp, 80), End(Ending::Forgotten)),
            (SSH.to_owned() + OPENS, to(tcp, 80), End(Ending::Stalled)),
            (SSH.to_owned() + OPENS, to(udp, 53), End(Ending::Forgotten)),
            (SSH.to_owned() + OPENS, of(tcp, 80), Leave),
        ] {
            assert_eq!(judged(&port(&rules), &entry, false), Some(expected), "{rules} {}", entry.original);
        }
        // Rules that refuse established packets, too, have ended it: forgotten, it could begin again.
        let stops = "<rule action='drop' direction='inout' priority='50'><tcp srcipaddr='10.0.0.9'/></rule>
            <rule action='drop' direction='inout' priority='50'><tcp dstipaddr='10.0.0.9'/></rule>";
        assert_eq!(judged(&port(stops), &to(tcp, 80), false), Some(Leave));
        let related = "<rule action='accept' direction='in'><all state='RELATED'/></rule>";
        assert_eq!(judged(&port(related), &to(tcp, 80), true), Some(Leave));
        assert_eq!(judged(&port(related), &to(tcp, 80), false), Some(End(Ending::Forgotten)));
    }

    #[test]
    fn connections_of_other_zones_of_the_host_and_of_others_are_no_ones_of_the_port() {
        let port = port("");
        let judged = |zone, source: &str, destination: &str, change: fn(&mut Entry)| {
            let mut entry = entry(protocol::TCP, zone, source, destination);
            change(&mut entry);
            judged(&port, &entry, false).is_some()
        };
        let plain: fn(&mut Entry) = |_| ();
        assert!(judged(7, "10.0.0.2:1000", "10.0.0.9:80", plain));
        assert!(judged(7, "10.0.0.9:1000", "10.0.0.2:80", plain));
        for (zone, source, destination) in [
            (8, "10.0.0.2:1000", "10.0.0.9:80"),
            (0, "10.0.0.2:1000", "10.0.0.9:80"),
            (0, "10.0.0.9:1000", "10.0.0.2:80"),
            (7, "10.0.0.3:1000", "10.0.0.9:80"),
        ] {
            assert!(!judged(zone, source, destination, plain), "{zone} {source} {destination}");
        }
        // With the host it is in zone 0: what the guest opens there, and what the host sends on with an address of its own.
        assert!(judged(0, "10.0.0.2:1000", "10.0.0.1:80", plain));
        assert!(judged(0, "10.0.0.2:1000", "192.0.2.9:80", |entry| {
            entry.reply.destination = "192.0.2.1".parse().unwrap();
        }));
        // What the host opens, or sends to the guest in place of another address, does not meet the rules.
        assert!(!judged(0, "10.0.0.1:1000", "10.0.0.2:80", plain));
        assert!(!judged(7, "10.0.0.9:1000", "10.0.0.2:80", |entry| {
            entry.reply.source = "10.0.0.7".parse().unwrap();
        }));
    }
}
