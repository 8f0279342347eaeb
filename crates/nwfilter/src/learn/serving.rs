//! Which guests may serve DHCP: those whose filter accepts it by name.

use nwfilter_rules::{Filters, reachable};
use nwfilter_xml::{Action, Direction, Field, FilterName, Literal, Matches, Protocol, Rule, Value};

use super::packets::{DHCP_SERVER, DHCP6_SERVER};

const UDP: u8 = 17;

/// Whether a filter lets its guest serve DHCP or DHCPv6: the filter, or one that it includes, has a rule that accepts UDP
/// from exactly the server's port. A rule that accepts such packets among others does not count, because nearly every
/// filter has one.
pub(crate) fn serves_dhcp(filters: &impl Filters, name: &FilterName) -> bool {
    let names = reachable(filters, name);
    names.iter().filter_map(|name| filters.filter(name)).flat_map(|filter| filter.rules()).any(says_so)
}

fn says_so(rule: &Rule) -> bool {
    // A rule for both directions has source and destination exchanged for packets from the guest.
    let (start, end) = match rule.direction {
        Direction::Out => (Field::SrcPortStart, Field::SrcPortEnd),
        Direction::InOut => (Field::DstPortStart, Field::DstPortEnd),
        Direction::In => return false,
    };
    rule.action == Action::Accept
        && rule.matches.as_ref().is_some_and(|matches| {
            let Some(server) = server_port(matches) else { return false };
            number(matches, start) == Some(server)
                && (matches.get(end).is_none() || number(matches, end) == Some(server))
        })
}

/// The server's port in the protocol of a rule; `None` if that is not UDP.
fn server_port(matches: &Matches) -> Option<u16> {
    match matches.protocol {
        Protocol::Udp => Some(DHCP_SERVER),
        Protocol::UdpOn6 => Some(DHCP6_SERVER),
        Protocol::Ip if number(matches, Field::IpProtocol) == Some(UDP.into()) => Some(DHCP_SERVER),
        Protocol::Ipv6 if number(matches, Field::IpProtocol) == Some(UDP.into()) => Some(DHCP6_SERVER),
        _ => None,
    }
}

/// The only value that a field may have.
fn number(matches: &Matches, field: Field) -> Option<u16> {
    match &matches.get(field).filter(|item| !item.negated)?.value {
        Value::Literal(Literal::U8(number)) => Some(number.value.into()),
        Value::Literal(Literal::U16(number)) => Some(number.value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn serves(rule: &str) -> bool {
        let texts = [
            "<filter name='outer'><filterref filter='inner'/></filter>".to_owned(),
            format!("<filter name='inner'>{rule}</filter>"),
        ];
        let filters = texts.map(|text| nwfilter_xml::read_filter("f.xml", &text).value.unwrap());
        let filters: BTreeMap<_, _> = filters.into_iter().map(|f| (f.name.clone(), f)).collect();
        serves_dhcp(&filters, &"outer".parse().unwrap())
    }

    #[test]
    fn a_filter_serves_dhcp_if_a_rule_accepts_the_servers_port_from_the_guest_by_name() {
        assert!(serves("<rule action='accept' direction='out'><udp srcportstart='67'/></rule>"));
        assert!(serves(
            "<rule action='accept' direction='out'><udp srcportstart='67' srcportend='67'/></rule>"
        ));
        assert!(serves("<rule action='accept' direction='out'><udp-ipv6 srcportstart='547'/></rule>"));
        let ip = "protocol='udp' srcportstart='67' dstportstart='68'";
        assert!(serves(&format!("<rule action='accept' direction='out'><ip {ip}/></rule>")));
        assert!(serves("<rule action='accept' direction='inout'><udp dstportstart='67'/></rule>"));
    }

    #[test]
    fn no_stock_filter_serves_dhcp() {
        let filters = crate::stock_filters();
        assert!(filters.keys().all(|name| !serves_dhcp(filters, name)));
    }

    #[test]
    fn a_filter_that_lets_a_servers_packets_pass_among_others_does_not_serve_dhcp() {
        assert!(!serves("<rule action='accept' direction='out'><udp/></rule>"));
        assert!(!serves("<rule action='accept' direction='out'><all/></rule>"));
        assert!(!serves(
            "<rule action='accept' direction='out'><udp srcportstart='1' srcportend='99'/></rule>"
        ));
        assert!(!serves(
            "<rule action='accept' direction='out'><udp srcportstart='67' srcportend='99'/></rule>"
        ));
        assert!(!serves("<rule action='accept' direction='out'><udp match='no' srcportstart='67'/></rule>"));
        assert!(!serves("<rule action='accept' direction='out'><tcp srcportstart='67'/></rule>"));
        assert!(!serves(
            "<rule action='accept' direction='out'><ip protocol='udp' dstportstart='67'/></rule>"
        ));
        assert!(!serves("<rule action='drop' direction='out'><udp srcportstart='67'/></rule>"));
        assert!(!serves("<rule action='accept' direction='in'><udp srcportstart='67'/></rule>"));
        assert!(!serves("<rule action='accept' direction='inout'><udp srcportstart='67'/></rule>"));
    }
}
