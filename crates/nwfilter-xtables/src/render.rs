//! Renders a ruleset as the chains of one port, in the tools' syntax.
//!
//! Chain names and contents are libvirt's. Values are numbers, so that nothing depends on the host's `/etc/protocols`,
//! `/etc/ethertypes` or `/etc/services`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use nwfilter_rules::{
    CtDirection, EthernetRule, EthernetSide, EthernetTest, Family, HelperRule, HelperSide, IpPart, IpRule,
    IpTest, LOG_RATE, LogPrefix, LogSide, MaskedMac, Match, Network, Origin, PortRange, RootEntry, Ruleset,
    StpRange, Transport, Verdict,
};
use nwfilter_xml::value::{States, TcpFlagSet};
use nwfilter_xml::{ChainName, MacAddr, PortDev};

use crate::names::{self, FROM_GUEST, FROM_GUEST_POST, HELPERS, IpChain, SubChains, TO_GUEST, TO_HOST, Way};
use crate::sets::ipset_name;
use crate::tool::TableId;

/// A rule without its chain, and its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) origin: Origin,
}

impl Line {
    /// A rule that no filter asks for.
    pub(crate) fn built_in(text: String) -> Self {
        Self { text, origin: Origin::BUILT_IN }
    }
}

/// Chains by name.
pub(crate) type Chains = BTreeMap<String, Vec<Line>>;

/// The chains of a port in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortTable {
    /// Its chains.
    pub(crate) chains: Chains,
    /// The rules that dispatch the port's packets to them: chain and rule.
    pub(crate) dispatch: Vec<(&'static str, String)>,
}

/// The chains of a port in every table.
pub(crate) fn render(
    port: &PortDev,
    ruleset: &Ruleset,
    sub_chains: &mut SubChains<'_>,
) -> BTreeMap<TableId, PortTable> {
    let mut tables = BTreeMap::new();
    tables.insert(TableId::EbtablesNat, ethernet(port, ruleset, sub_chains));
    for (family, filter, raw) in [
        (Family::Ipv4, TableId::IptablesFilter, TableId::IptablesRaw),
        (Family::Ipv6, TableId::Ip6tablesFilter, TableId::Ip6tablesRaw),
    ] {
        tables.insert(filter, ip(port, ruleset.ip(family), family));
        tables.insert(raw, helpers(port, ruleset, family));
    }
    tables.retain(|_, table| !table.chains.is_empty());
    tables
}

// ---- ebtables ----

fn ethernet(port: &PortDev, ruleset: &Ruleset, sub_chains: &mut SubChains<'_>) -> PortTable {
    let mut table = PortTable::default();
    let sides = [
        (&ruleset.ethernet.from_guest, Way::FromGuest, ("PREROUTING", "-i")),
        (&ruleset.ethernet.to_guest, Way::ToGuest, ("POSTROUTING", "-o")),
    ];
    for (side, way, (hook, interface)) in sides {
        let Some(side) = side else { continue };
        let root = way.root(port);
        table.dispatch.push((hook, format!("{interface} {port} -j {root}")));
        let names = side.chains.iter().map(|chain| (&chain.name, sub_chains.name(way, port, &chain.name)));
        ethernet_side(side, way.log_side(), root, &names.collect(), &mut table.chains);
    }
    table
}

fn ethernet_side(
    side: &EthernetSide,
    log_side: LogSide,
    root: String,
    names: &BTreeMap<&ChainName, String>,
    chains: &mut Chains,
) {
    let entries = side.root.iter().filter_map(|entry| match entry {
        RootEntry::Rule(rule) => Some(ethernet_line(rule, log_side)),
        RootEntry::Jump(jump) => {
            let name = names.get(&jump.chain)?;
            Some(Line::built_in(format!("{}-j {name}", ethernet_matches(&jump.matches))))
        }
    });
    chains.insert(root, entries.chain(ethernet_end(side.end)).collect());
    for chain in &side.chains {
        let lines =
            chain.rules.iter().map(|rule| ethernet_line(rule, log_side)).chain(ethernet_end(chain.end));
        chains.extend(names.get(&chain.name).map(|name| (name.clone(), lines.collect())));
    }
}

/// The rule at the end of a chain. ebtables accepts a frame at the end of a chain by itself.
pub(crate) fn ethernet_end(end: Verdict) -> Option<Line> {
    match end {
        Verdict::Accept | Verdict::Pass | Verdict::Continue | Verdict::Log(_) => None,
        Verdict::Drop | Verdict::Reject | Verdict::Return => {
            Some(Line::built_in(format!("-j {}", ethernet_target(end))))
        }
    }
}

fn ethernet_line(rule: &EthernetRule, side: LogSide) -> Line {
    let log = match rule.verdict {
        Verdict::Log(group) => {
            let prefix = LogPrefix::new(side, &rule.origin);
            format!(
                "--limit {LOG_RATE}/sec --limit-burst {LOG_RATE} --nflog-prefix \"{prefix}\" --nflog-group {group} "
            )
        }
        _ => String::new(),
    };
    let text = format!("{}{log}-j {}", ethernet_matches(&rule.matches), ethernet_target(rule.verdict));
    Line { text, origin: rule.origin.clone() }
}

/// ebtables cannot reject, so the frame is dropped, as in libvirt.
fn ethernet_target(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Accept | Verdict::Pass => "ACCEPT",
        Verdict::Drop | Verdict::Reject => "DROP",
        Verdict::Return => "RETURN",
        Verdict::Continue | Verdict::Log(_) => "CONTINUE",
    }
}

fn ethernet_matches(matches: &[Match<EthernetTest>]) -> String {
    let ipv6 = matches.iter().any(|m| m.test == EthernetTest::EtherType(0x86dd));
    let mut matches: Vec<_> = matches.iter().collect();
    matches.sort_by_key(|m| ethernet_rank(&m.test));
    let mut text = String::new();
    for m in matches {
        ethernet_match(&mut text, m, ipv6);
    }
    text
}

/// The order in which `ebtables-save` writes matches; what has no place of its own keeps the order it has.
fn ethernet_rank(test: &EthernetTest) -> u8 {
    use EthernetTest as Test;
    match test {
        Test::EtherType(_) => 0,
        Test::SrcMac(_) => 1,
        Test::DstMac(_) => 2,
        Test::ArpOpcode(_) => 3,
        Test::ArpHardwareType(_) => 4,
        Test::ArpProtocolType(_) => 5,
        Test::ArpSrcIp(_) | Test::SrcIp(_) => 6,
        Test::ArpDstIp(_) | Test::DstIp(_) => 7,
        Test::ArpSrcMac(_) | Test::Dscp(_) => 8,
        Test::ArpDstMac(_) | Test::IpProtocol(_) => 9,
        Test::ArpGratuitous | Test::SrcPort(_) => 10,
        Test::DstPort(_) => 11,
        Test::VlanId(_)
        | Test::VlanEncap(_)
        | Test::StpType(_)
        | Test::StpFlags(_)
        | Test::StpRange { .. }
        | Test::StpRootAddress(_)
        | Test::StpSenderAddress(_)
        | Test::IcmpRange { .. } => 12,
    }
}

fn ethernet_match(out: &mut String, m: &Match<EthernetTest>, ipv6: bool) {
    use EthernetTest as Test;
    let not = if m.negated { "! " } else { "" };
    let ip = if ipv6 { "ip6" } else { "ip" };
    // Writing to a String cannot fail.
    let _ = match &m.test {
        Test::EtherType(number) => write!(out, "-p {not}0x{number:04x} "),
        Test::SrcMac(mac) => write!(out, "-s {not}{} ", masked(mac)),
        Test::DstMac(mac) => write!(out, "-d {not}{} ", masked(mac)),
        Test::VlanId(id) => write!(out, "--vlan-id {not}{id} "),
        // ebtables reads it as hexadecimal, with or without 0x.
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
        Test::StpRootAddress(mac) => write!(out, "--stp-root-addr {not}{} ", masked(mac)),
        Test::StpSenderAddress(mac) => write!(out, "--stp-sender-addr {not}{} ", masked(mac)),
        Test::ArpHardwareType(number) => write!(out, "--arp-htype {not}{number} "),
        Test::ArpProtocolType(number) => write!(out, "--arp-ptype {not}0x{number:x} "),
        Test::ArpOpcode(number) => write!(out, "--arp-op {not}{number} "),
        Test::ArpSrcMac(addr) => write!(out, "--arp-mac-src {not}{addr} "),
        Test::ArpDstMac(addr) => write!(out, "--arp-mac-dst {not}{addr} "),
        Test::ArpSrcIp(network) => write!(out, "--arp-ip-src {not}{} ", shown(network)),
        Test::ArpDstIp(network) => write!(out, "--arp-ip-dst {not}{} ", shown(network)),
        Test::ArpGratuitous => write!(out, "{not}--arp-gratuitous "),
        Test::SrcIp(network) => write!(out, "--{ip}-src {not}{} ", shown(network)),
        Test::DstIp(network) => write!(out, "--{ip}-dst {not}{} ", shown(network)),
        Test::IpProtocol(number) => write!(out, "--{ip}-proto {not}{number} "),
        Test::SrcPort(ports) => write!(out, "--{ip}-sport {not}{} ", port_range(ports)),
        Test::DstPort(ports) => write!(out, "--{ip}-dport {not}{} ", port_range(ports)),
        Test::Dscp(number) => write!(out, "--{ip}-tos {not}0x{number:02x} "),
        Test::IcmpRange { kinds, codes } => {
            let (kinds, codes) = (range(&kinds.0, Some(&kinds.1)), range(&codes.0, Some(&codes.1)));
            write!(out, "--ip6-icmp-type {not}{kinds}/{codes} ")
        }
    };
}

/// `FROM:TO`, or `FROM` alone where both are the same.
fn range<T: std::fmt::Display + PartialEq>(from: &T, to: Option<&T>) -> String {
    match to {
        Some(to) if to != from => format!("{from}:{to}"),
        _ => from.to_string(),
    }
}

fn port_range(PortRange { from, to }: &PortRange) -> String {
    range(from, to.as_ref())
}

fn masked(MaskedMac { addr, mask }: &MaskedMac) -> String {
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
fn shown(&Network { addr, prefix }: &Network) -> String {
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
        // The upper 32 bits were set above.
        IpAddr::V4(_) => std::net::Ipv4Addr::from_bits((kept >> 96) as u32).into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(kept).into(),
    };
    format!("{network}/{prefix}")
}

// ---- iptables and ip6tables, filter ----

fn ip(port: &PortDev, part: Option<&IpPart>, family: Family) -> PortTable {
    let Some(part) = part else { return PortTable::default() };
    let lines =
        |rules: &[IpRule], side| rules.iter().map(|rule| ip_line(rule, family, side)).collect::<Vec<_>>();
    let from_guest = lines(&part.from_guest, LogSide::FromGuest);
    PortTable {
        chains: Chains::from([
            // Packets from the guest to the host pass INPUT instead of FORWARD.
            (IpChain::ToHost.of(port), from_guest.clone()),
            (IpChain::FromGuest.of(port), from_guest),
            (IpChain::ToGuest.of(port), lines(&part.to_guest, LogSide::ToGuest)),
        ]),
        dispatch: vec![
            (FROM_GUEST, format!("-m physdev --physdev-in {port} -g {}", IpChain::FromGuest.of(port))),
            (
                TO_GUEST,
                format!(
                    "-m physdev --physdev-out {port} --physdev-is-bridged -g {}",
                    IpChain::ToGuest.of(port)
                ),
            ),
            (FROM_GUEST_POST, format!("-m physdev --physdev-in {port} -j ACCEPT")),
            (TO_HOST, format!("-m physdev --physdev-in {port} -g {}", IpChain::ToHost.of(port))),
        ],
    }
}

fn ip_line(rule: &IpRule, family: Family, side: LogSide) -> Line {
    let mut matches: Vec<_> = rule.matches.iter().collect();
    let parted = compares_ports_as_one(rule);
    matches.sort_by_key(|m| match m.test {
        IpTest::DstPort(_) if parted => LAST_RANK - 1,
        _ => ip_rank(&m.test),
    });
    let protocol = rule.matches.iter().find_map(|m| match m.test {
        IpTest::IpProtocol(number) => Some(number),
        _ => None,
    });
    let mut writer = IpWriter { text: String::new(), family, protocol, transport_named: false };
    for m in matches {
        match &m.test {
            IpTest::DstPort(ports) if parted => writer.write_multiport(ports),
            _ => writer.write(m),
        }
    }
    let mut text = writer.text;
    if let Verdict::Log(group) = rule.verdict {
        let prefix = LogPrefix::new(side, &rule.origin);
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "-m limit --limit {LOG_RATE}/sec --limit-burst {LOG_RATE} -j NFLOG --nflog-prefix \"{prefix}\" --nflog-group {group}"
        );
    }
    text.push_str(match (rule.verdict, family) {
        (Verdict::Accept, _) => "-j ACCEPT",
        (Verdict::Drop, _) => "-j DROP",
        // After the port's chain comes the dispatch to the receiving port, or the end of the host's chain.
        (Verdict::Pass | Verdict::Return, _) => "-j RETURN",
        (Verdict::Reject, Family::Ipv4) => "-j REJECT --reject-with icmp-port-unreachable",
        (Verdict::Reject, Family::Ipv6) => "-j REJECT --reject-with icmp6-port-unreachable",
        // A rule without a target is counted; the next one decides.
        (Verdict::Continue | Verdict::Log(_), _) => "",
    });
    Line { text: text.trim_end().to_owned(), origin: rule.origin.clone() }
}

/// Whether iptables-nft 1.8.9 would join the two ports of the rule into one comparison. It does so for single ports. Negated,
/// the comparison matches if either port differs, and not only if both do.
fn compares_ports_as_one(rule: &IpRule) -> bool {
    let is_one = |ports: &PortRange| ports.to.is_none_or(|to| to == ports.from);
    let is_part = |m: &&Match<IpTest>| {
        m.negated && matches!(&m.test, IpTest::SrcPort(ports) | IpTest::DstPort(ports) if is_one(ports))
    };
    rule.matches.iter().filter(is_part).count() == 2
}

/// The rank of matches that keep their order.
const LAST_RANK: u8 = 9;

/// The order in which `iptables-save` writes matches; what has no place of its own keeps the order it has.
fn ip_rank(test: &IpTest) -> u8 {
    use IpTest as Test;
    match test {
        Test::SrcIp(_) => 0,
        Test::DstIp(_) => 1,
        Test::IpProtocol(_) => 2,
        Test::SrcMac(_) | Test::SrcIpRange { .. } | Test::DstIpRange { .. } | Test::Dscp(_) => 3,
        Test::SrcPort(_) => 4,
        Test::DstPort(_) => 5,
        Test::TcpOption(_) => 6,
        Test::TcpFlags { .. } => 7,
        Test::Icmp { .. }
        | Test::ConnlimitAbove(_)
        | Test::States(_)
        | Test::CtDirection(_)
        | Test::IpSet { .. }
        | Test::Set { .. }
        | Test::Comment(_) => LAST_RANK,
    }
}

struct IpWriter {
    text: String,
    family: Family,
    protocol: Option<u8>,
    /// Whether the match of the transport protocol (`-m tcp`) is already written.
    transport_named: bool,
}

impl IpWriter {
    fn write(&mut self, m: &Match<IpTest>) {
        use IpTest as Test;
        let not = if m.negated { "! " } else { "" };
        if matches!(m.test, Test::SrcPort(_) | Test::DstPort(_) | Test::TcpFlags { .. } | Test::TcpOption(_))
        {
            self.name_transport();
        }
        let family = self.family;
        let out = &mut self.text;
        // Writing to a String cannot fail.
        let _ = match &m.test {
            Test::SrcIp(network) => write!(out, "{not}-s {} ", with_prefix(network)),
            Test::DstIp(network) => write!(out, "{not}-d {} ", with_prefix(network)),
            Test::IpProtocol(number) => write!(out, "{not}-p {} ", protocol_name(*number)),
            Test::SrcMac(addr) => write!(out, "-m mac {not}--mac-source {addr} "),
            Test::SrcIpRange { from, to } => write!(out, "-m iprange {not}--src-range {from}-{to} "),
            Test::DstIpRange { from, to } => write!(out, "-m iprange {not}--dst-range {from}-{to} "),
            Test::Dscp(number) => write!(out, "-m dscp {not}--dscp 0x{number:02x} "),
            Test::TcpFlags { mask, set } => {
                write!(out, "{not}--tcp-flags {} {} ", tcp_flags(*mask), tcp_flags(*set))
            }
            Test::SrcPort(ports) => write!(out, "{not}--sport {} ", port_range(ports)),
            Test::DstPort(ports) => write!(out, "{not}--dport {} ", port_range(ports)),
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
                    CtDirection::Original => "ORIGINAL",
                    CtDirection::Reply => "REPLY",
                };
                write!(out, "-m conntrack {not}--ctdir {direction} ")
            }
            Test::IpSet { name, directions } => {
                let directions: Vec<_> = directions.iter().map(ToString::to_string).collect();
                write!(out, "-m set {not}--match-set {} {} ", quoted(name), directions.join(","))
            }
            Test::Set { name, direction, .. } => {
                write!(out, "-m set {not}--match-set {} {direction} ", ipset_name(name))
            }
            Test::ConnlimitAbove(limit) => {
                let option = if m.negated { "--connlimit-upto" } else { "--connlimit-above" };
                let width = if family == Family::Ipv4 { 32 } else { 128 };
                write!(out, "-m connlimit {option} {limit} --connlimit-mask {width} --connlimit-saddr ")
            }
            // A comment matches every packet, so there is nothing to negate.
            Test::Comment(text) => write!(out, "-m comment --comment {} ", quoted(comment(text))),
        };
    }

    /// Writes a negated destination port as a match of its own, which no tool joins with the source port.
    fn write_multiport(&mut self, ports: &PortRange) {
        // Writing to a String cannot fail.
        let _ = write!(self.text, "-m multiport ! --dports {} ", ports.from);
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
fn ct_states(states: States) -> String {
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
fn with_prefix(network: &Network) -> String {
    let text = shown(network);
    match (text.contains('/'), network.addr) {
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

fn helpers(port: &PortDev, ruleset: &Ruleset, family: Family) -> PortTable {
    let rules = ruleset.helpers.iter().filter(|rule| rule.family == family);
    let lines: Vec<_> = rules.flat_map(|rule| helper_lines(port, rule, ruleset)).collect();
    if lines.is_empty() {
        return PortTable::default();
    }
    let chain = names::helpers(port.as_str());
    PortTable { dispatch: vec![(HELPERS, format!("-j {chain}"))], chains: Chains::from([(chain, lines)]) }
}

/// In the raw table the bridge port of the destination is not known: the guest's addresses select connections to it.
fn helper_lines(port: &PortDev, rule: &HelperRule, ruleset: &Ruleset) -> Vec<Line> {
    let transport = match rule.transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let (number, helper) = (rule.port, rule.helper);
    let to_control = format!("-m {transport} --dport {number} -j CT --helper {helper}");
    let texts: Vec<_> = match rule.side {
        HelperSide::Guest => guest_addresses(ruleset, rule.family)
            .map(|addr| format!("-d {} -p {transport} {to_control}", with_prefix(&addr.into())))
            .collect(),
        HelperSide::Elsewhere => vec![format!("-p {transport} -m physdev --physdev-in {port} {to_control}")],
    };
    texts.into_iter().map(Line::built_in).collect()
}

/// The guest's addresses of a family.
pub(crate) fn guest_addresses(ruleset: &Ruleset, family: Family) -> impl Iterator<Item = IpAddr> {
    ruleset.guest_addresses.iter().copied().filter(move |addr| Family::of(*addr) == family)
}

#[cfg(test)]
mod tests {
    use nwfilter_xml::SetFamily;
    use nwfilter_xml::value::SetDirection;

    use super::*;

    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const MASK: Option<MacAddr> = Some(MacAddr([0xff, 0xff, 0, 0, 0, 0]));
    const ADDR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    /// An omitted test would widen its rule.
    #[test]
    fn every_ethernet_test_and_its_negation_are_written() {
        use EthernetTest as Test;
        let masked = MaskedMac { addr: MAC, mask: MASK };
        let network = Network { addr: ADDR, prefix: Some(24) };
        let ports = PortRange { from: 1, to: Some(2) };
        let tests = [
            Test::SrcMac(masked),
            Test::DstMac(masked),
            Test::EtherType(0x0806),
            Test::VlanId(1),
            Test::VlanEncap(0x0806),
            Test::StpType(1),
            Test::StpFlags(1),
            Test::StpRange { field: StpRange::MaxAge, from: 1, to: Some(2) },
            Test::StpRootAddress(masked),
            Test::StpSenderAddress(masked),
            Test::ArpHardwareType(1),
            Test::ArpProtocolType(1),
            Test::ArpOpcode(1),
            Test::ArpSrcMac(MAC),
            Test::ArpDstMac(MAC),
            Test::ArpSrcIp(network),
            Test::ArpDstIp(network),
            Test::ArpGratuitous,
            Test::SrcIp(network),
            Test::DstIp(network),
            Test::IpProtocol(17),
            Test::SrcPort(ports),
            Test::DstPort(ports),
            Test::Dscp(1),
            Test::IcmpRange { kinds: (1, 2), codes: (0, 3) },
        ];
        let mut seen = std::collections::BTreeSet::new();
        for test in tests {
            let [is, is_not] = [Match::is(test.clone()), Match::is_not(test)].map(|m| ethernet_matches(&[m]));
            assert!(!is.is_empty() && is_not.contains('!'), "{is} | {is_not}");
            assert!(seen.insert(is.clone()) && seen.insert(is_not), "{is} stands for two tests");
            let has_mask =
                ["-s ", "-d ", "--stp-root-addr", "--stp-sender-addr"].iter().any(|o| is.starts_with(o));
            assert!(!has_mask || is.contains("/ff:ff:00:00:00:00"), "{is}");
        }
    }

    #[test]
    fn every_ip_test_and_its_negation_are_written() {
        use IpTest as Test;
        let network = Network { addr: ADDR, prefix: Some(24) };
        let ports = PortRange { from: 1, to: Some(2) };
        let (mask, set) = (TcpFlagSet::default(), TcpFlagSet::default());
        let tests = [
            Test::SrcMac(MAC),
            Test::SrcIp(network),
            Test::DstIp(network),
            Test::SrcIpRange { from: ADDR, to: ADDR },
            Test::DstIpRange { from: ADDR, to: ADDR },
            Test::IpProtocol(17),
            Test::SrcPort(ports),
            Test::DstPort(ports),
            Test::Dscp(1),
            Test::Icmp { kind: 1, code: Some(2) },
            Test::ConnlimitAbove(1),
            Test::States(States::NEW),
            Test::CtDirection(CtDirection::Reply),
            Test::IpSet { name: "x".into(), directions: vec![SetDirection::Src] },
            Test::Set { name: "x".parse().unwrap(), family: SetFamily::Mac, direction: SetDirection::Dst },
            Test::TcpFlags { mask, set },
            Test::TcpOption(1),
        ];
        for test in tests {
            let line =
                |m| ip_line(&IpRule::built_in([m], Verdict::Drop), Family::Ipv4, LogSide::ToGuest).text;
            let (is, is_not) = (line(Match::is(test.clone())), line(Match::is_not(test)));
            assert_ne!(is, "-j DROP");
            assert_ne!(is, is_not);
            assert!(is_not.contains("! ") || is_not.contains("--connlimit-upto"), "{is_not}");
        }
    }
}
