//! Rulesets in the tools' words: the chains of one port and what is in them.
//!
//! Chain names and contents are libvirt's. Values are written as numbers, so that nothing depends on the host's
//! `/etc/protocols`, `/etc/ethertypes` or `/etc/services`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use nwfilter_rules::{
    EthernetSide, Family, HelperRule, HelperSide, IpPart, Match, Origin, RootEntry, Rule, Ruleset, StpRange,
    Test, Transport, Verdict,
};
use nwfilter_xml::value::TcpFlagSet;
use nwfilter_xml::{ChainKind, MacAddr, PortDev};

use crate::tool::TableId;

/// A rule without the chain it is in, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) origin: Origin,
}

/// Chains by name.
pub(crate) type Chains = BTreeMap<String, Vec<Line>>;

/// What a port has in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortTable {
    /// Its chains.
    pub(crate) chains: Chains,
    /// The rules that lead packets of the port into them: chain and rule.
    pub(crate) dispatch: Vec<(&'static str, String)>,
}

/// What a port has in every table.
pub(crate) fn render(port: &PortDev, ruleset: &Ruleset) -> BTreeMap<TableId, PortTable> {
    let mut tables = BTreeMap::new();
    tables.insert(TableId::EbtablesNat, ethernet(port, ruleset));
    tables.insert(TableId::IptablesFilter, ip(port, ruleset.ipv4.as_ref(), Family::Ipv4));
    tables.insert(TableId::Ip6tablesFilter, ip(port, ruleset.ipv6.as_ref(), Family::Ipv6));
    tables.insert(TableId::IptablesRaw, helpers(port, &ruleset.helpers, Family::Ipv4));
    tables.insert(TableId::Ip6tablesRaw, helpers(port, &ruleset.helpers, Family::Ipv6));
    tables.retain(|_, table| !table.chains.is_empty());
    tables
}

// ---- ebtables ----

fn ethernet(port: &PortDev, ruleset: &Ruleset) -> PortTable {
    let mut table = PortTable::default();
    let sides = [
        (&ruleset.ethernet.from_guest, 'I', ("PREROUTING", "-i")),
        (&ruleset.ethernet.to_guest, 'O', ("POSTROUTING", "-o")),
    ];
    for (side, letter, (hook, interface)) in sides {
        let Some(side) = side else { continue };
        let root = format!("libvirt-{letter}-{port}");
        table.dispatch.push((hook, format!("{interface} {port} -j {root}")));
        ethernet_side(port, side, letter, root, &mut table.chains);
    }
    table
}

fn ethernet_side(port: &PortDev, side: &EthernetSide, letter: char, root: String, chains: &mut Chains) {
    let sub_chain = |name: &dyn std::fmt::Display| format!("{letter}-{port}-{name}");
    let entries = side.root.iter().map(|entry| match entry {
        RootEntry::Rule(rule) => ethernet_line(rule),
        RootEntry::Jump(chain) => {
            let condition = match chain.kind() {
                ChainKind::Root | ChainKind::Mac => "",
                ChainKind::Stp => "-d 01:80:c2:00:00:00 ",
                ChainKind::Vlan => "-p 0x8100 ",
                ChainKind::Arp => "-p 0x0806 ",
                ChainKind::Rarp => "-p 0x8035 ",
                ChainKind::Ipv4 => "-p 0x0800 ",
                ChainKind::Ipv6 => "-p 0x86dd ",
            };
            let text = format!("{condition}-j {}", sub_chain(chain));
            Line { text, origin: Origin { filter: None, line: 0 } }
        }
    });
    chains.insert(root, entries.collect());
    for chain in &side.chains {
        chains.insert(sub_chain(&chain.name), chain.rules.iter().map(ethernet_line).collect());
    }
}

fn ethernet_line(rule: &Rule) -> Line {
    let ipv6 = rule.matches.iter().any(|m| m.test == Test::EtherType(0x86dd));
    let mut matches: Vec<&Match> = rule.matches.iter().collect();
    matches.sort_by_key(|m| ethernet_rank(&m.test));
    let mut text = String::new();
    for m in matches {
        ethernet_match(&mut text, m, ipv6);
    }
    let target = match rule.verdict {
        Verdict::Accept => "ACCEPT",
        Verdict::Drop | Verdict::Reject => "DROP",
        Verdict::Return => "RETURN",
        Verdict::Continue => "CONTINUE",
    };
    let _ = write!(text, "-j {target}");
    Line { text, origin: rule.origin.clone() }
}

/// The order in which `ebtables-save` writes matches; what has no place of its own keeps the order it has.
fn ethernet_rank(test: &Test) -> u8 {
    match test {
        Test::EtherType(_) => 0,
        Test::SrcMac { .. } => 1,
        Test::DstMac { .. } => 2,
        Test::ArpOpcode(_) => 3,
        Test::ArpHardwareType(_) => 4,
        Test::ArpProtocolType(_) => 5,
        Test::ArpSrcIp { .. } | Test::SrcIp { .. } => 6,
        Test::ArpDstIp { .. } | Test::DstIp { .. } => 7,
        Test::ArpSrcMac(_) | Test::Dscp(_) => 8,
        Test::ArpDstMac(_) | Test::IpProtocol(_) => 9,
        Test::ArpGratuitous | Test::SrcPort { .. } => 10,
        Test::DstPort { .. } => 11,
        _ => 12,
    }
}

fn ethernet_match(out: &mut String, m: &Match, ipv6: bool) {
    let not = if m.negated { "! " } else { "" };
    let ip = if ipv6 { "ip6" } else { "ip" };
    // Writing to a String cannot fail.
    let _ = match &m.test {
        Test::EtherType(number) => write!(out, "-p {not}0x{number:04x} "),
        Test::SrcMac { addr, mask } => write!(out, "-s {not}{} ", masked(addr, mask.as_ref())),
        Test::DstMac { addr, mask } => write!(out, "-d {not}{} ", masked(addr, mask.as_ref())),
        Test::VlanId(id) => write!(out, "--vlan-id {not}{id} "),
        // Read as hexadecimal, whether it starts with 0x or not.
        Test::VlanEncap(number) => write!(out, "--vlan-encap {not}0x{number:04x} "),
        Test::StpType(number) => write!(out, "--stp-type {not}{number} "),
        Test::StpFlags(number) => write!(out, "--stp-flags {not}{number} "),
        Test::StpRange { field, from, to } => {
            let option = match field {
                StpRange::RootPriority => "--stp-root-prio",
                StpRange::RootCost => "--stp-root-cost",
                StpRange::SenderPriority => "--stp-sender-prio",
                StpRange::Port => "--stp-port",
                StpRange::MessageAge => "--stp-msg-age",
                StpRange::MaxAge => "--stp-max-age",
                StpRange::HelloTime => "--stp-hello-time",
                StpRange::ForwardDelay => "--stp-forward-delay",
            };
            write!(out, "{option} {not}{} ", range(from, to.as_ref()))
        }
        Test::StpRootAddress { addr, mask } => {
            write!(out, "--stp-root-addr {not}{} ", masked(addr, mask.as_ref()))
        }
        Test::StpSenderAddress { addr, mask } => {
            write!(out, "--stp-sender-addr {not}{} ", masked(addr, mask.as_ref()))
        }
        Test::ArpHardwareType(number) => write!(out, "--arp-htype {not}{number} "),
        Test::ArpProtocolType(number) => write!(out, "--arp-ptype {not}0x{number:x} "),
        Test::ArpOpcode(number) => write!(out, "--arp-op {not}{number} "),
        Test::ArpSrcMac(addr) => write!(out, "--arp-mac-src {not}{addr} "),
        Test::ArpDstMac(addr) => write!(out, "--arp-mac-dst {not}{addr} "),
        Test::ArpSrcIp { addr, prefix } => {
            write!(out, "--arp-ip-src {not}{} ", network((*addr).into(), Some(*prefix)))
        }
        Test::ArpDstIp { addr, prefix } => {
            write!(out, "--arp-ip-dst {not}{} ", network((*addr).into(), Some(*prefix)))
        }
        Test::ArpGratuitous => write!(out, "{not}--arp-gratuitous "),
        Test::SrcIp { addr, prefix } => write!(out, "--{ip}-src {not}{} ", network(*addr, *prefix)),
        Test::DstIp { addr, prefix } => write!(out, "--{ip}-dst {not}{} ", network(*addr, *prefix)),
        Test::IpProtocol(number) => write!(out, "--{ip}-proto {not}{number} "),
        Test::SrcPort { from, to } => write!(out, "--{ip}-sport {not}{} ", range(from, to.as_ref())),
        Test::DstPort { from, to } => write!(out, "--{ip}-dport {not}{} ", range(from, to.as_ref())),
        Test::Dscp(number) => write!(out, "--{ip}-tos {not}0x{number:02x} "),
        Test::IcmpRange { kinds, codes } => {
            let (kinds, codes) = (range(&kinds.0, Some(&kinds.1)), range(&codes.0, Some(&codes.1)));
            write!(out, "--ip6-icmp-type {not}{kinds}/{codes} ")
        }
        // The Ethernet layer has no such matches; nwfilter-rules makes none.
        _ => Ok(()),
    };
}

/// `FROM:TO`, or `FROM` alone where both are the same.
fn range<T: std::fmt::Display + PartialEq>(from: &T, to: Option<&T>) -> String {
    match to {
        Some(to) if to != from => format!("{from}:{to}"),
        _ => from.to_string(),
    }
}

fn masked(addr: &MacAddr, mask: Option<&MacAddr>) -> String {
    const ALL_ONES: MacAddr = MacAddr([0xff; 6]);
    match mask {
        Some(mask) if *mask != ALL_ONES => {
            let network: [u8; 6] = std::array::from_fn(|i| addr.0[i] & mask.0[i]);
            format!("{}/{mask}", MacAddr(network))
        }
        _ => addr.to_string(),
    }
}

/// An address, or the network of a prefix shorter than it.
fn network(addr: IpAddr, prefix: Option<u8>) -> String {
    let (bits, width) = match addr {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let prefix = prefix.unwrap_or(width);
    if prefix >= width {
        return addr.to_string();
    }
    let kept = bits & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
    let network: IpAddr = match addr {
        // The upper 32 bits were put there above.
        IpAddr::V4(_) => std::net::Ipv4Addr::from_bits((kept >> 96) as u32).into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(kept).into(),
    };
    format!("{network}/{prefix}")
}

// ---- iptables and ip6tables, filter ----

/// The base chains of the filter table.
pub(crate) const FROM_GUEST: &str = "libvirt-in";
pub(crate) const TO_GUEST: &str = "libvirt-out";
pub(crate) const FROM_GUEST_POST: &str = "libvirt-in-post";
pub(crate) const TO_HOST: &str = "libvirt-host-in";

fn ip(port: &PortDev, part: Option<&IpPart>, family: Family) -> PortTable {
    let Some(part) = part else { return PortTable::default() };
    let chains = [
        (format!("FI-{port}"), &part.from_guest),
        (format!("FO-{port}"), &part.to_guest),
        (format!("HI-{port}"), &part.to_host),
    ];
    let lines = |rules: &Vec<Rule>| rules.iter().map(|rule| ip_line(rule, family)).collect();
    PortTable {
        chains: chains.into_iter().map(|(name, rules)| (name, lines(rules))).collect(),
        dispatch: vec![
            (FROM_GUEST, format!("-m physdev --physdev-in {port} -g FI-{port}")),
            (TO_GUEST, format!("-m physdev --physdev-out {port} --physdev-is-bridged -g FO-{port}")),
            (FROM_GUEST_POST, format!("-m physdev --physdev-in {port} -j ACCEPT")),
            (TO_HOST, format!("-m physdev --physdev-in {port} -g HI-{port}")),
        ],
    }
}

fn ip_line(rule: &Rule, family: Family) -> Line {
    let mut matches: Vec<&Match> = rule.matches.iter().collect();
    matches.sort_by_key(|m| ip_rank(&m.test));
    let protocol = rule.matches.iter().find_map(|m| match m.test {
        Test::IpProtocol(number) => Some(number),
        _ => None,
    });
    let mut writer = IpWriter { text: String::new(), family, protocol, transport_named: false };
    for m in matches {
        writer.write(m);
    }
    let mut text = writer.text;
    text.push_str(match (rule.verdict, family) {
        (Verdict::Accept, _) => "-j ACCEPT",
        (Verdict::Drop, _) => "-j DROP",
        (Verdict::Return, _) => "-j RETURN",
        (Verdict::Reject, Family::Ipv4) => "-j REJECT --reject-with icmp-port-unreachable",
        (Verdict::Reject, Family::Ipv6) => "-j REJECT --reject-with icmp6-port-unreachable",
        // A rule without a target is counted; the next one decides.
        (Verdict::Continue, _) => "",
    });
    Line { text: text.trim_end().to_owned(), origin: rule.origin.clone() }
}

/// The order in which `iptables-save` writes matches; what has no place of its own keeps the order it has.
fn ip_rank(test: &Test) -> u8 {
    match test {
        Test::SrcIp { .. } => 0,
        Test::DstIp { .. } => 1,
        Test::IpProtocol(_) => 2,
        Test::SrcMac { .. } | Test::SrcIpRange { .. } | Test::DstIpRange { .. } | Test::Dscp(_) => 3,
        Test::SrcPort { .. } => 4,
        Test::DstPort { .. } => 5,
        Test::TcpOption(_) => 6,
        Test::TcpFlags { .. } => 7,
        _ => 8,
    }
}

struct IpWriter {
    text: String,
    family: Family,
    protocol: Option<u8>,
    /// Whether the match of the transport protocol (`-m tcp`) stands already.
    transport_named: bool,
}

impl IpWriter {
    fn write(&mut self, m: &Match) {
        let not = if m.negated { "! " } else { "" };
        if matches!(
            m.test,
            Test::SrcPort { .. } | Test::DstPort { .. } | Test::TcpFlags { .. } | Test::TcpOption(_)
        ) {
            self.name_transport();
        }
        let family = self.family;
        let out = &mut self.text;
        // Writing to a String cannot fail.
        let _ = match &m.test {
            Test::SrcIp { addr, prefix } => write!(out, "{not}-s {} ", with_prefix(*addr, *prefix)),
            Test::DstIp { addr, prefix } => write!(out, "{not}-d {} ", with_prefix(*addr, *prefix)),
            Test::IpProtocol(number) => write!(out, "{not}-p {} ", protocol_name(*number)),
            Test::SrcMac { addr, .. } => write!(out, "-m mac {not}--mac-source {addr} "),
            Test::SrcIpRange { from, to } => write!(out, "-m iprange {not}--src-range {from}-{to} "),
            Test::DstIpRange { from, to } => write!(out, "-m iprange {not}--dst-range {from}-{to} "),
            Test::Dscp(number) => write!(out, "-m dscp {not}--dscp 0x{number:02x} "),
            Test::TcpFlags { mask, set } => {
                write!(out, "{not}--tcp-flags {} {} ", tcp_flags(*mask), tcp_flags(*set))
            }
            Test::SrcPort { from, to } => write!(out, "{not}--sport {} ", range(from, to.as_ref())),
            Test::DstPort { from, to } => write!(out, "{not}--dport {} ", range(from, to.as_ref())),
            Test::TcpOption(number) => write!(out, "{not}--tcp-option {number} "),
            Test::Icmp { kind, code } => {
                let (module, option) = match family {
                    Family::Ipv4 => ("icmp", "--icmp-type"),
                    Family::Ipv6 => ("icmp6", "--icmpv6-type"),
                };
                let code = code.map(|code| format!("/{code}")).unwrap_or_default();
                write!(out, "-m {module} {not}{option} {kind}{code} ")
            }
            Test::States(states) => write!(out, "-m conntrack {not}--ctstate {} ", ct_states(*states)),
            Test::CtDirection(direction) => {
                let direction = match direction {
                    nwfilter_rules::CtDirection::Original => "ORIGINAL",
                    nwfilter_rules::CtDirection::Reply => "REPLY",
                };
                write!(out, "-m conntrack --ctdir {direction} ")
            }
            Test::IpSet { name, directions } => {
                let directions: Vec<_> = directions.iter().map(ToString::to_string).collect();
                write!(out, "-m set {not}--match-set {} {} ", quoted(name), directions.join(","))
            }
            Test::ConnlimitAbove(limit) => {
                let option = if m.negated { "--connlimit-upto" } else { "--connlimit-above" };
                let width = if family == Family::Ipv4 { 32 } else { 128 };
                write!(out, "-m connlimit {option} {limit} --connlimit-mask {width} --connlimit-saddr ")
            }
            Test::Comment(text) => write!(out, "-m comment --comment {} ", quoted(comment(text))),
            // The IP layer has no such matches; nwfilter-rules makes none.
            _ => Ok(()),
        };
    }

    fn name_transport(&mut self) {
        if !self.transport_named {
            let name = self.protocol.map(protocol_name).unwrap_or_default();
            let _ = write!(self.text, "-m {name} ");
            self.transport_named = true;
        }
    }
}

/// The states in the order in which iptables-save writes them.
fn ct_states(states: nwfilter_xml::value::States) -> String {
    use nwfilter_xml::value::States;
    const ORDER: [States; 4] = [States::INVALID, States::NEW, States::RELATED, States::ESTABLISHED];
    let named: Vec<_> = ORDER.iter().filter(|s| states.contains(**s)).map(ToString::to_string).collect();
    named.join(",")
}

/// The flags in the order of their bits, without the name ALL that iptables-save does not use.
fn tcp_flags(flags: TcpFlagSet) -> String {
    let names: Vec<_> =
        TcpFlagSet::NAMES.iter().filter(|(bit, _)| flags.bits() & bit != 0).map(|(_, name)| *name).collect();
    if names.is_empty() { "NONE".to_owned() } else { names.join(",") }
}

fn protocol_name(number: u8) -> String {
    let name = match number {
        1 => "icmp",
        6 => "tcp",
        17 => "udp",
        50 => "esp",
        51 => "ah",
        58 => "ipv6-icmp",
        132 => "sctp",
        136 => "udplite",
        _ => return number.to_string(),
    };
    name.to_owned()
}

/// iptables writes the prefix of single addresses too.
fn with_prefix(addr: IpAddr, prefix: Option<u8>) -> String {
    let text = network(addr, prefix);
    match (text.contains('/'), addr) {
        (true, _) => text,
        (false, IpAddr::V4(_)) => text + "/32",
        (false, IpAddr::V6(_)) => text + "/128",
    }
}

/// A comment as the kernel keeps it: at most 255 bytes.
fn comment(text: &str) -> &str {
    const LONGEST: usize = 255;
    let end = (0..=text.len().min(LONGEST)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// A word as the restore tools read it and the save tools write it: in quotes unless it is plain. A line break would
/// end the rule, so it becomes a blank.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        if matches!(c, '"' | '\\' | '\'') {
            out.push('\\');
        }
        out.push(if c == '\n' { ' ' } else { c });
    }
    out.push('"');
    out
}

// ---- iptables and ip6tables, raw: conntrack helpers ----

/// The base chain of the raw table. libvirt has none.
pub(crate) const HELPERS: &str = "nwfilter-ct";

fn helpers(port: &PortDev, rules: &[HelperRule], family: Family) -> PortTable {
    let lines: Vec<_> =
        rules.iter().filter(|rule| rule.family == family).flat_map(|r| helper_lines(port, r)).collect();
    if lines.is_empty() {
        return PortTable::default();
    }
    let chain = format!("CT-{port}");
    PortTable { dispatch: vec![(HELPERS, format!("-j {chain}"))], chains: Chains::from([(chain, lines)]) }
}

fn helper_lines(port: &PortDev, rule: &HelperRule) -> Vec<Line> {
    let transport = match rule.transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let (number, helper) = (rule.port, rule.helper);
    let to_control = format!("-m {transport} --dport {number} -j CT --helper {helper}");
    let texts = match &rule.side {
        HelperSide::Guest { addresses } => addresses
            .iter()
            .map(|addr| format!("-d {} -p {transport} {to_control}", with_prefix(*addr, None)))
            .collect(),
        HelperSide::Elsewhere => vec![format!("-p {transport} -m physdev --physdev-in {port} {to_control}")],
    };
    texts.into_iter().map(|text| Line { text, origin: Origin { filter: None, line: 0 } }).collect()
}
