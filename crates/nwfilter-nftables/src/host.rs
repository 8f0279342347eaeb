//! Conntrack helpers for connections that the host itself opens to guests: `table inet nwfilter`.
//!
//! The kernel confirms such a connection before it comes to the bridge, and a confirmed connection gets no helper. So the
//! helper is assigned where the packet leaves the host, by the guest's address: its port is not known there.
//!
//! ```text
//! table inet nwfilter {
//!   ct helper host-ftp-tcp { type "ftp" protocol tcp; }
//!   set host-ftp-tcp-ipv4 { type ipv4_addr . inet_service; }                    the guests' servers
//!   set host-ftp-tcp-ipv4-ports { type ifname . ipv4_addr . inet_service; }     which port has which of them
//!   chain host-output { ct state new … ip daddr . th dport @host-ftp-tcp-ipv4 ct helper set "host-ftp-tcp" }
//! }
//! ```
//!
//! No rule looks into the sets of ports. Two guests can have one address: a server stays as long as a port has it. The table
//! exists while a port has a server.

use std::net::IpAddr;
use std::sync::Arc;

use nwfilter_rules::{Family, HelperSide, KNOWN_HELPERS, Ruleset};
use nwfilter_xml::PortDev;

use crate::class::HelperKind;
use crate::condition::{self, SAME_BYTES};
use crate::kernel::expr::{IFNAMSIZ, Load, MetaKey};
use crate::kernel::{
    BaseChain, Chain, ChainName, ChainType, CtHelper, Datatype, Element, ElementKey, Hook, Object, Policy,
    Rule, Set, TableId, field,
};
use crate::layout;

/// The prefix of all names in the table. No name of the bridge table starts with it: class names contain a dot.
const PREFIX: &str = "host-";
/// The suffix of the sets of ports.
const PORTS: &str = "-ports";
/// After connection tracking, which is at -200, and before the connection is confirmed.
const PRIORITY: i32 = -150;

/// The table.
pub(crate) fn table() -> TableId {
    TableId::inet(layout::fixed(layout::TABLE_NAME))
}

/// Whether a chain, set or object of this name is in the table.
pub(crate) fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && !name.contains('.')
}

/// Whether the keys of a set of the table begin with a port.
pub(crate) fn is_of_ports(set: &str) -> bool {
    is_name(set) && set.ends_with(PORTS)
}

/// A server of a guest whose connections get a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Server {
    pub(crate) kind: ServerKind,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

/// Servers of one helper and family. Each kind has a rule and two sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServerKind {
    helper: HelperKind,
    family: Family,
}

/// The servers of a port.
pub(crate) fn servers(ruleset: &Ruleset) -> Vec<Server> {
    let rules = ruleset.helpers.iter().filter(|rule| rule.side == HelperSide::Guest);
    let mut servers: Vec<Server> = rules
        .flat_map(|rule| {
            let helper = HelperKind { name: rule.helper.name(), transport: rule.transport };
            let kind = ServerKind { helper, family: rule.family };
            let addresses = ruleset.guest_addresses.iter().filter(|addr| Family::of(**addr) == rule.family);
            addresses.map(move |address| Server { kind, address: *address, port: rule.port })
        })
        .collect();
    servers.sort();
    servers.dedup();
    servers
}

impl Server {
    /// The element of the set of servers.
    pub(crate) fn element(&self) -> Element {
        Element::new(ElementKey::one(&[self.address_bytes(), self.port.to_be_bytes().to_vec()]))
    }

    /// The element of the set of ports.
    pub(crate) fn element_of(&self, port: &PortDev) -> Element {
        let fields = [layout::port_key(port), self.address_bytes(), self.port.to_be_bytes().to_vec()];
        Element::new(ElementKey::one(&fields))
    }

    fn address_bytes(&self) -> Vec<u8> {
        match self.address {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        }
    }
}

/// The key of a set of servers in one of the set of ports.
pub(crate) fn server_key(of_port: &ElementKey) -> Option<ElementKey> {
    match of_port {
        ElementKey::One(key) => Some(ElementKey::One(key.get(IFNAMSIZ..)?.to_vec())),
        ElementKey::Range(..) => None,
    }
}

impl ServerKind {
    /// All that there can be.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let known = KNOWN_HELPERS.iter().flat_map(|known| Family::ALL.map(|family| (known, family)));
        known.filter(|(known, family)| *family == Family::Ipv4 || known.ipv6).map(|(known, family)| Self {
            helper: HelperKind { name: known.helper.name(), transport: known.transport },
            family,
        })
    }

    /// The kernel's name of the helper.
    pub(crate) fn helper(self) -> &'static str {
        self.helper.name
    }

    /// The helper's object.
    pub(crate) fn object(self) -> Object {
        let Object::CtHelper(helper) = layout::helper(self.helper);
        let name = layout::fixed(&format!("{PREFIX}{}", helper.name));
        Object::CtHelper(CtHelper { name, ..helper })
    }

    /// The set of servers.
    pub(crate) fn servers(self) -> Arc<Set> {
        Arc::new(Set::new(layout::fixed(&self.set_name()), self.fields()))
    }

    /// The set of ports and their servers.
    pub(crate) fn ports(self) -> Arc<Set> {
        let fields: Vec<Datatype> = std::iter::once(Datatype::Ifname).chain(self.fields()).collect();
        Arc::new(Set::new(layout::fixed(&format!("{}{PORTS}", self.set_name())), fields))
    }

    fn set_name(self) -> String {
        let family = match self.family {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
        };
        format!("{}-{family}", self.object().name())
    }

    fn fields(self) -> [Datatype; 2] {
        let address = match self.family {
            Family::Ipv4 => Datatype::Ipv4Addr,
            Family::Ipv6 => Datatype::Ipv6Addr,
        };
        [address, Datatype::InetService]
    }

    /// The rule that assigns the helper.
    fn rule(self) -> Rule {
        /// NFPROTO_IPV4, NFPROTO_IPV6
        const PROTOCOLS: [u8; 2] = [2, 10];
        let (protocol, address) = match self.family {
            Family::Ipv4 => (PROTOCOLS[0], field::IP_DADDR),
            Family::Ipv6 => (PROTOCOLS[1], field::IP6_DADDR),
        };
        let mut rule = Rule::new().equal(Load::Meta(MetaKey::Nfproto), [protocol]);
        let conditions = [condition::l4proto_is(self.helper.protocol()), condition::is_new()];
        for condition in &conditions {
            rule.exprs.extend(condition::literal(condition, &layout::fixed(SAME_BYTES)));
        }
        rule.is_in(&[address, field::DPORT], &self.servers().name).object(&self.object())
    }
}

/// The name of the chain.
pub(crate) fn chain_name() -> ChainName {
    layout::fixed("host-output")
}

/// The chain that assigns the helpers of these kinds.
pub(crate) fn output(kinds: &[ServerKind]) -> (Chain, Vec<Rule>) {
    let base =
        BaseChain { kind: ChainType::Filter, hook: Hook::Output, priority: PRIORITY, policy: Policy::Accept };
    (Chain { name: chain_name(), base: Some(base) }, kinds.iter().map(|kind| kind.rule()).collect())
}
