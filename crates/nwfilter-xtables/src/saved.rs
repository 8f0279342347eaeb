//! What the save tools print, as chains of comparable rules.

use std::collections::BTreeMap;

use crate::tool::Tool;

/// One table: chains by name, each with its rules in order.
pub(crate) type SavedTable = BTreeMap<String, Vec<String>>;

/// The tables of one tool, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    tables: BTreeMap<String, SavedTable>,
}

impl Saved {
    /// Reads the output of `TOOL-save`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut tables: BTreeMap<String, SavedTable> = BTreeMap::new();
        let mut current = String::new();
        for line in text.lines() {
            let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Some(table) = line.strip_prefix('*') {
                current = table.to_owned();
                tables.entry(current.clone()).or_default();
            } else if let Some(chain) = command.strip_prefix(':') {
                tables.entry(current.clone()).or_default().entry(chain.to_owned()).or_default();
            } else if command == "-A" {
                let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
                let chains = tables.entry(current.clone()).or_default();
                chains.entry(chain.to_owned()).or_default().push(rule.trim_end().to_owned());
            }
        }
        Self { tables }
    }

    /// A table; an empty one where the tool shows none.
    pub(crate) fn table(&self, name: &str) -> &SavedTable {
        const EMPTY: &SavedTable = &SavedTable::new();
        self.tables.get(name).unwrap_or(EMPTY)
    }
}

/// A rule in a form in which equal rules are equal texts, whether it was rendered by us or printed by a tool.
///
/// The ebtables tool prints names where numbers were given, from tables of its own and from `/etc/ethertypes` and
/// `/etc/protocols`; here all become numbers.
pub(crate) fn canonical(tool: Tool, rule: &str) -> String {
    match tool {
        Tool::Ebtables => canonical_ebtables(rule),
        Tool::Iptables | Tool::Ip6tables => canonical_iptables(rule),
    }
}

fn canonical_ebtables(rule: &str) -> String {
    let mut words = Vec::new();
    let mut option = "";
    for word in rule.split_ascii_whitespace() {
        if word.starts_with('-') {
            option = word;
            words.push(word.to_owned());
        } else if word == "!" {
            words.push(word.to_owned());
        } else {
            words.push(ebtables_value(option, word));
        }
    }
    words.join(" ")
}

fn ebtables_value(option: &str, value: &str) -> String {
    let number = |number: u32| format!("{number:#x}");
    let named = |names: &[(&str, u32)]| {
        let found = names.iter().find(|(name, _)| name.eq_ignore_ascii_case(value));
        found.map(|(_, value)| *value).or_else(|| parse_number(value)).map(number)
    };
    let canonical = match option {
        "-p" => named(&ETHER_TYPES),
        "-s" | "-d" => MAC_CLASSES.iter().find(|(name, _)| *name == value).map(|(_, mac)| (*mac).to_owned()),
        "--ip-proto" | "--ip6-proto" => named(&IP_PROTOCOLS),
        "--arp-op" => named(&ARP_OPCODES),
        "--stp-type" => named(&[("config", 0), ("tcn", 128)]),
        "--stp-flags" => named(&[("topology-change", 1), ("topology-change-ack", 128)]),
        "--ip6-icmp-type" => {
            ICMPV6_TYPES.iter().find(|(name, _)| *name == value).map(|(_, range)| (*range).to_owned())
        }
        "--arp-ptype" | "--arp-htype" | "--ip-tos" | "--vlan-id" | "--vlan-encap" => named(&[]),
        _ => None,
    };
    canonical.unwrap_or_else(|| value.to_owned())
}

fn parse_number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

const ETHER_TYPES: [(&str, u32); 5] =
    [("IPv4", 0x0800), ("ARP", 0x0806), ("RARP", 0x8035), ("802_1Q", 0x8100), ("IPv6", 0x86dd)];

const MAC_CLASSES: [(&str, &str); 4] = [
    ("Unicast", "00:00:00:00:00:00/01:00:00:00:00:00"),
    ("Multicast", "01:00:00:00:00:00/01:00:00:00:00:00"),
    ("Broadcast", "ff:ff:ff:ff:ff:ff"),
    ("BGA", "01:80:c2:00:00:00"),
];

const IP_PROTOCOLS: [(&str, u32); 10] = [
    ("icmp", 1),
    ("igmp", 2),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("sctp", 132),
    ("udplite", 136),
];

const ARP_OPCODES: [(&str, u32); 9] = [
    ("Request", 1),
    ("Reply", 2),
    ("Request_Reverse", 3),
    ("Reply_Reverse", 4),
    ("DRARP_Request", 5),
    ("DRARP_Reply", 6),
    ("DRARP_Error", 7),
    ("InARP_Request", 8),
    ("ARP_NAK", 9),
];

const ICMPV6_TYPES: [(&str, &str); 1] = [("destination-unreachable", "1/0:255")];

/// The iptables tools print what we render, but for the case of MAC addresses and the base of a mark.
fn canonical_iptables(rule: &str) -> String {
    match rule.find("--mac-source ") {
        None => rule.to_owned(),
        Some(at) => {
            let (before, after) = rule.split_at(at + "--mac-source ".len());
            let (mac, rest) = after.split_at(after.find(' ').unwrap_or(after.len()));
            format!("{before}{}{rest}", mac.to_ascii_lowercase())
        }
    }
}
