//! Compares rules that this crate rendered with rules that a tool printed.
//!
//! A tool prints names for numbers, omits matches that match everything, and formats addresses in its own way. Which
//! names it prints depends on `/etc/protocols` and `/etc/ethertypes` of the host. [`canonical`] removes these differences.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::net::Ipv6Addr;
use std::sync::LazyLock;

use crate::saved::SavedRule;
use crate::tool::Tool;

/// Whether two rules are the same to a tool.
pub(crate) fn same(tool: Tool, a: &str, b: &str) -> bool {
    a == b || canonical(tool, a) == canonical(tool, b)
}

/// Whether two lists of rules are the same to a tool.
pub(crate) fn same_rules<'a, 'b>(
    tool: Tool,
    a: impl ExactSizeIterator<Item = &'a str>,
    b: impl ExactSizeIterator<Item = &'b str>,
) -> bool {
    a.len() == b.len() && a.zip(b).all(|(a, b)| same(tool, a, b))
}

/// The canonical text of a rule: two rules with the same text do the same.
pub(crate) fn canonical(tool: Tool, rule: &str) -> String {
    let mut out = String::with_capacity(rule.len());
    let words = words(rule);
    let options = options(&words);
    // ebtables-save leaves out the limit of most rules that log.
    let logs = tool == Tool::Ebtables && options.iter().any(|option| option.name == "--nflog-group");
    for option in options {
        if logs && matches!(option.name, "--limit" | "--limit-burst") {
            continue;
        }
        let Some((negated, value)) = canonical_value(tool, &option) else { continue };
        let not = if negated { "! " } else { "" };
        // Writing to a String cannot fail.
        let _ = write!(out, "{}{not}{}", if out.is_empty() { "" } else { " " }, option.name);
        if !value.is_empty() {
            let _ = write!(out, " {value}");
        }
    }
    out
}

/// One option of a rule and its values.
#[derive(Debug, PartialEq, Eq)]
struct RuleOption<'a> {
    name: &'a str,
    negated: bool,
    values: Vec<&'a str>,
}

/// The words of a rule, without the quotes around them.
fn words(rule: &str) -> Vec<Cow<'_, str>> {
    SavedRule::new(rule).words().map(unquoted).collect()
}

fn unquoted(word: &str) -> Cow<'_, str> {
    let Some(quoted) = word.strip_prefix('"') else { return word.into() };
    let (mut text, mut chars) = (String::new(), quoted.chars());
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => text.extend(chars.next()),
            c => text.push(c),
        }
    }
    text.into()
}

/// The options of a rule. ebtables writes `!` after the option, iptables before it.
fn options<'a>(words: &'a [Cow<'a, str>]) -> Vec<RuleOption<'a>> {
    const WITHOUT_VALUE: [&str; 4] =
        ["--physdev-is-bridged", "--connlimit-saddr", "--connlimit-daddr", "--arp-gratuitous"];
    let mut options: Vec<RuleOption<'_>> = Vec::new();
    let mut negated = false;
    for (index, word) in words.iter().map(Cow::as_ref).enumerate() {
        let lacks_value =
            |option: &RuleOption<'_>| option.values.is_empty() && !WITHOUT_VALUE.contains(&option.name);
        match options.last_mut().filter(|option| lacks_value(option) || !is_option(word)) {
            Some(option) if word == "!" && lacks_value(option) => option.negated = true,
            Some(_) if word == "!" && words.get(index + 1).is_some_and(|next| is_option(next)) => {
                negated = true
            }
            Some(option) => option.values.push(word),
            None if word == "!" => negated = true,
            None => {
                options.push(RuleOption { name: word, negated, values: Vec::new() });
                negated = false;
            }
        }
    }
    options
}

fn is_option(word: &str) -> bool {
    word.starts_with('-')
}

/// Whether an option is negated, and its value. `None` if the option matches every packet: the tools omit it then.
fn canonical_value<'a>(tool: Tool, option: &RuleOption<'a>) -> Option<(bool, Cow<'a, str>)> {
    if let Some(complement) = complement_of_ports(option) {
        return Some((false, complement.into()));
    }
    let value: Cow<'a, str> = match option.values[..] {
        [value] => value.into(),
        _ => option.values.join(" ").into(),
    };
    let canonical = match tool {
        Tool::Ebtables => {
            let canonical = ebtables_value(option.name, &value);
            // ebtables-save prints this number without the `!` of a negation.
            if option.name == "-p" && canonical.as_deref() == Some(LENGTH) {
                return Some((false, LENGTH.into()));
            }
            canonical
        }
        Tool::Iptables | Tool::Ip6tables => {
            if !option.negated && matches_everything(option.name, &value) {
                return None;
            }
            iptables_value(option.name, &value)
        }
    };
    Some((option.negated, canonical.map_or(value, Cow::Owned)))
}

/// The complement of a negated range that starts at 0 or ends at 65535: iptables prints it instead of the negation.
fn complement_of_ports(option: &RuleOption<'_>) -> Option<String> {
    let (true, "--sport" | "--dport", [value]) = (option.negated, option.name, &option.values[..]) else {
        return None;
    };
    match value.split_once(':')? {
        ("0", last) => Some(format!("{}:65535", last.parse::<u16>().ok()?.checked_add(1)?)),
        (first, "65535") => Some(format!("0:{}", first.parse::<u16>().ok()?.checked_sub(1)?)),
        _ => None,
    }
}

fn matches_everything(option: &str, value: &str) -> bool {
    match option {
        "-s" | "-d" => value.ends_with("/0"),
        "--sport" | "--dport" => value == "0:65535",
        "--tcp-flags" => value == "NONE NONE",
        _ => false,
    }
}

fn iptables_value(option: &str, value: &str) -> Option<String> {
    match option {
        "-p" => number_of(value, &HOST.protocols).map(|number| number.to_string()),
        "--mac-source" => Some(value.to_ascii_lowercase()),
        // Type 255 means any type and takes no code.
        "--icmp-type" if value == "any" || value.starts_with("255/") => Some("255".to_owned()),
        "-s" | "-d" | "--src-range" | "--dst-range" => addresses(value),
        _ => None,
    }
}

fn ebtables_value(option: &str, value: &str) -> Option<String> {
    let hex = |number: u32| format!("{number:#x}");
    match option {
        "-p" if value == "Length" => Some(LENGTH.to_owned()),
        "-p" => number_of(value, &HOST.ether_types).map(hex),
        "-s" | "-d" => MAC_CLASSES.iter().find(|(name, _)| *name == value).map(|(_, mac)| (*mac).to_owned()),
        "--ip-proto" | "--ip6-proto" => number_of(value, &HOST.protocols).map(hex),
        "--arp-op" => named(value, &ARP_OPCODES).or_else(|| number(value)).map(hex),
        "--arp-ptype" => number_of(value, &HOST.ether_types).map(hex),
        "--arp-htype" | "--ip-tos" | "--ip6-tclass" | "--vlan-id" => number(value).map(hex),
        // Hexadecimal, with or without 0x.
        "--vlan-encap" => u32::from_str_radix(value.trim_start_matches("0x"), 16)
            .ok()
            .or_else(|| number_of(value, &HOST.ether_types))
            .map(hex),
        "--stp-type" => named(value, &STP_TYPES).or_else(|| number(value)).map(hex),
        "--stp-flags" => named(value, &STP_FLAGS).or_else(|| number(value)).map(hex),
        "--ip6-icmp-type" => Some(icmpv6_range(value)),
        "--ip6-src" | "--ip6-dst" => addresses(value),
        _ => None,
    }
}

/// IPv6 addresses in Rust's notation: glibc, which the tools use, prints `::1.2.3.4` for `::102:304`.
fn addresses(value: &str) -> Option<String> {
    if !value.contains(':') {
        return None;
    }
    let end = value.find(['-', '/']).unwrap_or(value.len());
    let (first, rest) = value.split_at(end);
    let first: Ipv6Addr = first.parse().ok()?;
    let rest = match rest.strip_prefix('-').map(str::parse::<Ipv6Addr>) {
        Some(Ok(last)) => format!("-{last}"),
        _ => rest.to_owned(),
    };
    Some(format!("{first}{rest}"))
}

fn named(name: &str, names: &[(&str, u32)]) -> Option<u32> {
    names.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, number)| *number)
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn number_of(text: &str, names: &HashMap<String, u32>) -> Option<u32> {
    number(text).or_else(|| names.get(&text.to_ascii_lowercase()).copied())
}

/// A range of types and a range of codes: `1:5/0:3`. A type without a code means all codes.
fn icmpv6_range(value: &str) -> String {
    let named = ICMPV6_TYPES.iter().find(|(name, ..)| *name == value);
    if let Some((_, kind, code)) = named {
        return match code {
            Some(code) => format!("{kind}:{kind}/{code}:{code}"),
            None => format!("{kind}:{kind}/0:255"),
        };
    }
    let range = |text: &str| if text.contains(':') { text.to_owned() } else { format!("{text}:{text}") };
    match value.split_once('/') {
        Some((kinds, codes)) => format!("{}/{}", range(kinds), range(codes)),
        None => format!("{}/0:255", range(value)),
    }
}

/// The lowest EtherType. Smaller numbers are the length of a frame; ebtables-save prints this one as `Length` too.
const LENGTH: &str = "0x600";

/// The names that this host has for protocol numbers and EtherTypes.
struct HostNames {
    protocols: HashMap<String, u32>,
    ether_types: HashMap<String, u32>,
}

static HOST: LazyLock<HostNames> = LazyLock::new(|| {
    let read = |path, base| {
        let text = fs::read_to_string(path).unwrap_or_default();
        numbers_of_names(&text, base)
    };
    let with_built_in = |mut names: HashMap<String, u32>, built_in: &[(&str, u32)]| {
        names.extend(built_in.iter().map(|(name, number)| ((*name).to_owned(), *number)));
        names
    };
    HostNames {
        protocols: with_built_in(read("/etc/protocols", 10), &PROTOCOLS),
        ether_types: with_built_in(read("/etc/ethertypes", 16), &ETHER_TYPES),
    }
});

/// Reads `/etc/protocols` or `/etc/ethertypes`: each line has a name, its number and aliases.
fn numbers_of_names(text: &str, base: u32) -> HashMap<String, u32> {
    let mut numbers = HashMap::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let (Some(name), Some(number)) = (words.next(), words.next()) else { continue };
        if let Ok(number) = u32::from_str_radix(number, base) {
            numbers.extend([name].into_iter().chain(words).map(|name| (name.to_ascii_lowercase(), number)));
        }
    }
    numbers
}

/// The names that the tools have built in.
const PROTOCOLS: [(&str, u32); 10] = [
    ("tcp", 6),
    ("sctp", 132),
    ("udp", 17),
    ("udplite", 136),
    ("icmp", 1),
    ("icmpv6", 58),
    ("ipv6-icmp", 58),
    ("esp", 50),
    ("ah", 51),
    ("all", 0),
];

const ETHER_TYPES: [(&str, u32); 5] =
    [("ipv4", 0x0800), ("arp", 0x0806), ("rarp", 0x8035), ("802_1q", 0x8100), ("ipv6", 0x86dd)];

const MAC_CLASSES: [(&str, &str); 4] = [
    ("Unicast", "00:00:00:00:00:00/01:00:00:00:00:00"),
    ("Multicast", "01:00:00:00:00:00/01:00:00:00:00:00"),
    ("Broadcast", "ff:ff:ff:ff:ff:ff"),
    ("BGA", "01:80:c2:00:00:00"),
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

const STP_TYPES: [(&str, u32); 2] = [("config", 0), ("tcn", 128)];

const STP_FLAGS: [(&str, u32); 2] = [("topology-change", 1), ("topology-change-ack", 128)];

/// Names that ebtables prints for a type, or for a type and one code.
const ICMPV6_TYPES: [(&str, u8, Option<u8>); 33] = [
    ("destination-unreachable", 1, None),
    ("no-route", 1, Some(0)),
    ("communication-prohibited", 1, Some(1)),
    ("beyond-scope", 1, Some(2)),
    ("address-unreachable", 1, Some(3)),
    ("port-unreachable", 1, Some(4)),
    ("failed-policy", 1, Some(5)),
    ("reject-route", 1, Some(6)),
    ("packet-too-big", 2, None),
    ("time-exceeded", 3, None),
    ("ttl-exceeded", 3, None),
    ("ttl-zero-during-transit", 3, Some(0)),
    ("ttl-zero-during-reassembly", 3, Some(1)),
    ("parameter-problem", 4, None),
    ("bad-header", 4, Some(0)),
    ("unknown-header-type", 4, Some(1)),
    ("unknown-option", 4, Some(2)),
    ("echo-request", 128, None),
    ("ping", 128, None),
    ("echo-reply", 129, None),
    ("pong", 129, None),
    ("mld-listener-query", 130, None),
    ("mld-listener-report", 131, None),
    ("mld-listener-done", 132, None),
    ("mld-listener-reduction", 132, None),
    ("router-solicitation", 133, None),
    ("router-advertisement", 134, None),
    ("neighbour-solicitation", 135, None),
    ("neighbor-solicitation", 135, None),
    ("neighbour-advertisement", 136, None),
    ("neighbor-advertisement", 136, None),
    ("redirect", 137, None),
    ("mobile-prefix-solicitation", 146, None),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tool_prints_is_the_same_rule_as_what_it_was_given() {
        for (tool, given, printed) in [
            (Tool::Iptables, "-s 0.0.0.0/0 -p 6 -m tcp --dport 1", "-p tcp -m tcp --dport 1"),
            (Tool::Iptables, "-p tcp -m tcp --sport 0:65535 -j DROP", "-p tcp -m tcp -j DROP"),
            (Tool::Iptables, "-p tcp -m tcp --tcp-flags NONE NONE", "-p tcp -m tcp"),
            (Tool::Iptables, "-p icmp -m icmp --icmp-type 255", "-p icmp -m icmp --icmp-type any"),
            (
                Tool::Iptables,
                "-m mac ! --mac-source 0a:00:00:00:00:0b",
                "-m mac ! --mac-source 0A:00:00:00:00:0B",
            ),
            (Tool::Iptables, "-m comment --comment \"-x\"", "-m comment --comment -x"),
            (
                Tool::Iptables,
                "-m comment --comment \"a \\\"b\\\"\" -j DROP",
                "-m comment --comment \"a \\\"b\\\"\" -j DROP",
            ),
            (Tool::Iptables, "-m set --match-set \"a b\" src", "-m set --match-set a b src"),
            (Tool::Ip6tables, "-s ::/0 ! -d ::102:304/127", "! -d ::1.2.3.4/127"),
            (
                Tool::Ip6tables,
                "-m iprange --src-range ::102:304-::102:305",
                "-m iprange --src-range ::1.2.3.4-::1.2.3.5",
            ),
            (Tool::Ebtables, "-p ! 0x0600 -j DROP", "-p ! Length -j DROP"),
            (Tool::Ebtables, "-p 0x8035 -j DROP", "-p RARP -j DROP"),
            (Tool::Ebtables, "-d 01:80:c2:00:00:00 -j A", "-d BGA -j A"),
            (
                Tool::Ebtables,
                "-p 0x86dd --ip6-proto 58 --ip6-icmp-type ! 128/0:255",
                "-p IPv6 --ip6-proto ipv6-icmp --ip6-icmp-type ! echo-request",
            ),
            (Tool::Ebtables, "--ip6-icmp-type 1:5/3", "--ip6-icmp-type 1:5/3:3"),
            (Tool::Ebtables, "--vlan-id 16 --vlan-encap 0x0806", "--vlan-id 16 --vlan-encap 0806"),
            (
                Tool::Ebtables,
                "-p 0x0800 --limit 20/sec --limit-burst 20 --nflog-prefix \"nwfilter:in:f:3\" --nflog-group 1 -j CONTINUE",
                "-p IPv4 --nflog-prefix \"nwfilter:in:f:3\" --nflog-group 1 -j CONTINUE",
            ),
            (Tool::Ebtables, "--stp-type 0 --stp-flags 1", "--stp-type config --stp-flags topology-change"),
        ] {
            assert!(same(tool, given, printed), "{} | {}", canonical(tool, given), canonical(tool, printed));
        }
    }

    #[test]
    fn what_differs_stays_different() {
        for (tool, a, b) in [
            (Tool::Iptables, "-s 10.0.0.0/8 -j DROP", "-j DROP"),
            (Tool::Iptables, "! -s 10.0.0.1/32", "-s 10.0.0.1/32"),
            (Tool::Iptables, "-p tcp -m tcp ! --sport 0:65535", "-p tcp -m tcp"),
            (Tool::Iptables, "-m comment --comment \"! -s\"", "-m comment ! --comment -s"),
            (Tool::Ebtables, "-p ! 0x0800", "-p 0x0800"),
            (Tool::Ebtables, "--arp-op 1", "--arp-op 2"),
            (Tool::Ebtables, "! --arp-gratuitous -j DROP", "--arp-gratuitous -j DROP"),
        ] {
            assert!(!same(tool, a, b), "{}", canonical(tool, a));
        }
    }

    #[test]
    fn names_of_the_host_are_read_with_their_aliases() {
        let names = numbers_of_names("# a comment\n\nIPv4 0800 ip ip4 # IP\nARP 0806 ether-arp\nbad\n", 16);
        assert_eq!(names.get("ip4"), Some(&0x800));
        assert_eq!(names.get("arp"), Some(&0x806));
        assert_eq!(names.len(), 5);
    }
}
