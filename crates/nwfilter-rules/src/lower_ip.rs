//! Lowers IP rules: one rule of the language becomes up to two, for packets from the guest and to it.

use std::net::IpAddr;

use nwfilter_xml::value::{SetDirection, States};
use nwfilter_xml::{Action, Direction, Field, Literal, Protocol, Rule as XmlRule};

use crate::error::RulesError;
use crate::expand::Fields;
use crate::packet::{CtDirection, IpTest as Test, Network, PortRange};
use crate::ruleset::{IpPart, IpRule, Match, Rule, Verdict};

/// One of the up to two lines of a rule.
struct Line {
    /// Whether source and destination are exchanged.
    reversed: bool,
    /// The state match, and whether the packet's direction in its connection is matched too.
    state: Option<(States, bool)>,
    /// Whether an ICMP type leaves the line out.
    without_icmp_type: bool,
    /// The verdict for `accept`.
    accept: Verdict,
}

/// Adds the lines of a rule.
pub(crate) fn lower(rule: &XmlRule, fields: &Fields<'_>, part: &mut IpPart) -> Result<(), RulesError> {
    let own_state = match fields.get(Field::States)? {
        Some((Literal::States(states), _))
            if rule.statematch && !states.is_empty() && has_literal_state(rule) =>
        {
            Some(states)
        }
        _ => None,
    };
    let direction = rule.direction;
    let (incoming, both) = (direction.is_in(), direction == Direction::InOut);
    // A rule with an explicit state has only the lines of its own direction.
    let explicit = own_state.is_some();
    let state = |reversed: bool| match own_state {
        Some(states) => Some(states).filter(|s| !s.contains(States::NONE)).map(|s| (s, false)),
        None if both || !rule.statematch => None,
        None if reversed => Some((States::ESTABLISHED, true)),
        None => Some((States::NEW | States::ESTABLISHED, true)),
    };
    let from_guest = Line {
        reversed: incoming,
        state: state(incoming),
        without_icmp_type: incoming,
        accept: Verdict::Pass,
    };
    let to_guest = Line {
        reversed: !incoming,
        state: state(!incoming),
        without_icmp_type: !incoming || both,
        accept: Verdict::Accept,
    };
    if !explicit || direction.is_out() {
        part.from_guest.extend(from_guest.lower(rule, fields)?);
    }
    if !explicit || direction.is_in() {
        part.to_guest.extend(to_guest.lower(rule, fields)?);
    }
    Ok(())
}

/// libvirt evaluates a rule's state when the filter is defined; a variable has no effect.
fn has_literal_state(rule: &XmlRule) -> bool {
    let state = rule.matches.as_ref().and_then(|matches| matches.get(Field::States));
    state.is_some_and(|item| matches!(item.value, nwfilter_xml::Value::Literal(_)))
}

impl Line {
    /// The line. `None` if it matches nothing or is omitted.
    fn lower(&self, rule: &XmlRule, fields: &Fields<'_>) -> Result<Option<IpRule>, RulesError> {
        let Some(matches) = &rule.matches else { return Ok(None) };
        let mut line = LineBuilder { fields, reversed: self.reversed, matches: Vec::new() };
        line.protocol(matches.protocol);
        let before = line.matches.len();
        let mac_skipped = line.source_mac()?;
        line.addresses()?;
        line.dscp()?;
        let has_icmp_type = match matches.protocol {
            Protocol::Icmp | Protocol::Icmpv6 => line.icmp()?,
            _ => {
                line.transport(matches.protocol)?;
                false
            }
        };
        let connlimit = matches.get(Field::ConnlimitAbove).is_some();
        let nothing_left = mac_skipped && line.matches.len() == before;
        if nothing_left || (connlimit && self.reversed) || (has_icmp_type && self.without_icmp_type) {
            return Ok(None);
        }
        self.state(rule, &mut line, connlimit, has_icmp_type);
        line.set_connlimit_and_comment()?;
        let verdict = match rule.action {
            Action::Accept => self.accept,
            Action::Drop => Verdict::Drop,
            Action::Reject => Verdict::Reject,
            Action::Return => Verdict::Return,
            Action::Continue => Verdict::Continue,
        };
        Ok(Some(Rule { matches: line.matches, verdict, origin: fields.origin.clone() }))
    }

    fn state(&self, rule: &XmlRule, line: &mut LineBuilder<'_, '_>, connlimit: bool, has_icmp_type: bool) {
        let Some((states, implicit)) = self.state else { return };
        let accepts = rule.action == Action::Accept;
        if (implicit && !accepts) || (accepts && connlimit) {
            return;
        }
        line.push(Test::States(states), false, &[]);
        if implicit && !has_icmp_type {
            let direction = if self.reversed { CtDirection::Reply } else { CtDirection::Original };
            line.push(Test::CtDirection(direction), false, &[]);
        }
    }
}

struct LineBuilder<'a, 'f> {
    fields: &'a Fields<'f>,
    reversed: bool,
    matches: Vec<Match<Test>>,
}

impl LineBuilder<'_, '_> {
    /// Adds a match on the values of these attributes.
    fn push(&mut self, test: Test, negated: bool, of: &[Field]) {
        self.matches.push(Match { test, negated, variables: self.fields.variables(of) });
    }

    fn pair<T>(&self, src: T, dst: T) -> (T, T) {
        if self.reversed { (dst, src) } else { (src, dst) }
    }

    fn protocol(&mut self, protocol: Protocol) {
        let number = match protocol {
            Protocol::Tcp | Protocol::TcpOn6 => 6,
            Protocol::Udp | Protocol::UdpOn6 => 17,
            Protocol::UdpLite | Protocol::UdpLiteOn6 => 136,
            Protocol::Esp | Protocol::EspOn6 => 50,
            Protocol::Ah | Protocol::AhOn6 => 51,
            Protocol::Sctp | Protocol::SctpOn6 => 132,
            Protocol::Icmp => 1,
            Protocol::Icmpv6 => 58,
            Protocol::Igmp => 2,
            _ => return,
        };
        self.push(Test::IpProtocol(number), false, &[]);
    }

    /// True if the rule asks for a source address that a reversed line cannot match.
    fn source_mac(&mut self) -> Result<bool, RulesError> {
        let Some((Literal::Mac(addr), negated)) = self.fields.get(Field::SrcMac)? else { return Ok(false) };
        if !self.reversed {
            self.push(Test::SrcMac(addr), negated, &[Field::SrcMac]);
        }
        Ok(self.reversed)
    }

    /// If a rule has both an address and a range, the address is used.
    fn addresses(&mut self) -> Result<(), RulesError> {
        type AddressTest = fn(Network) -> Test;
        type RangeTest = fn(IpAddr, IpAddr) -> Test;
        let src: (AddressTest, RangeTest) = (Test::SrcIp, |from, to| Test::SrcIpRange { from, to });
        let dst: (AddressTest, RangeTest) = (Test::DstIp, |from, to| Test::DstIpRange { from, to });
        let (src, dst) = self.pair(src, dst);
        for ((addr, mask, from, to), (address_test, range_test)) in [
            ((Field::SrcIp, Field::SrcIpMask, Field::SrcIpFrom, Field::SrcIpTo), src),
            ((Field::DstIp, Field::DstIpMask, Field::DstIpFrom, Field::DstIpTo), dst),
        ] {
            if let Some((network, negated)) = address(self.fields, addr, mask)? {
                if negated && network.prefix == Some(0) {
                    let why = "match='no' with a mask of 0 leaves no address: this rule could match nothing";
                    return Err(self.fields.inexpressible(why));
                }
                self.push(address_test(network), negated, &[addr, mask]);
            } else if let Some((first, negated)) = ip(self.fields, from)? {
                let last = ip(self.fields, to)?.map_or(first, |(last, _)| last);
                self.push(range_test(first, last), negated, &[from, to]);
            }
        }
        Ok(())
    }

    fn dscp(&mut self) -> Result<(), RulesError> {
        if let Some((Literal::U8(number), negated)) = self.fields.get(Field::Dscp)? {
            self.push(Test::Dscp(number.value), negated, &[Field::Dscp]);
        }
        Ok(())
    }

    /// Flags, ports and options of TCP; ports of the other protocols. For UDP the kernel accepts empty ranges too.
    fn transport(&mut self, protocol: Protocol) -> Result<(), RulesError> {
        if let Some((Literal::TcpFlags { mask, set }, negated)) = self.fields.get(Field::TcpFlags)? {
            self.push(Test::TcpFlags { mask, set }, negated, &[Field::TcpFlags]);
        }
        let (src, dst) = self.pair(Test::SrcPort as fn(_) -> _, Test::DstPort);
        let read_range = match protocol {
            Protocol::Udp | Protocol::UdpOn6 => port_range,
            _ => filled_port_range,
        };
        for (start, end, test) in
            [(Field::SrcPortStart, Field::SrcPortEnd, src), (Field::DstPortStart, Field::DstPortEnd, dst)]
        {
            if let Some((ports, negated)) = read_range(self.fields, start, end)? {
                self.push(test(ports), negated, &[start, end]);
            }
        }
        if let Some((Literal::U8(option), negated)) = self.fields.get(Field::TcpOption)? {
            if option.value == 0 {
                return Err(self
                    .fields
                    .inexpressible("TCP option 0 ends the list of options and cannot be matched"));
            }
            self.push(Test::TcpOption(option.value), negated, &[Field::TcpOption]);
        }
        Ok(())
    }

    /// True if the rule asks for an ICMP type. A code without a type is not matched on.
    fn icmp(&mut self) -> Result<bool, RulesError> {
        let Some((Literal::U8(kind), negated)) = self.fields.get(Field::IcmpType)? else { return Ok(false) };
        let code = match self.fields.get(Field::IcmpCode)? {
            Some((Literal::U8(code), _)) => Some(code.value),
            _ => None,
        };
        self.push(Test::Icmp { kind: kind.value, code }, negated, &[Field::IcmpType, Field::IcmpCode]);
        Ok(true)
    }

    fn set_connlimit_and_comment(&mut self) -> Result<(), RulesError> {
        let set = self.fields.get(Field::IpSet)?;
        let flags = self.fields.get(Field::IpSetFlags)?;
        if let (Some((Literal::IpSet(name), _)), Some((Literal::IpSetFlags(flags), _))) = (set, flags) {
            let reversed = |flag| match flag {
                SetDirection::Src => SetDirection::Dst,
                SetDirection::Dst => SetDirection::Src,
            };
            let directions = flags.into_iter().map(|flag| if self.reversed { reversed(flag) } else { flag });
            let directions = directions.collect();
            self.push(Test::IpSet { name, directions }, false, &[Field::IpSet, Field::IpSetFlags]);
        }
        if let Some((Literal::U16(limit), negated)) = self.fields.get(Field::ConnlimitAbove)? {
            self.push(Test::ConnlimitAbove(limit.value), negated, &[Field::ConnlimitAbove]);
        }
        if let Some((Literal::Text(text), _)) = self.fields.get(Field::Comment)? {
            self.push(Test::Comment(text), false, &[Field::Comment]);
        }
        Ok(())
    }
}

/// An IP address field.
fn ip(fields: &Fields<'_>, field: Field) -> Result<Option<(IpAddr, bool)>, RulesError> {
    Ok(match fields.get(field)? {
        Some((Literal::Ipv4(addr), negated)) => Some((addr.into(), negated)),
        Some((Literal::Ipv6(addr), negated)) => Some((addr.into(), negated)),
        _ => None,
    })
}

/// An IP address with its mask. A mask without an address has no effect.
pub(crate) fn address(
    fields: &Fields<'_>,
    addr: Field,
    mask: Field,
) -> Result<Option<(Network, bool)>, RulesError> {
    let Some((addr, negated)) = ip(fields, addr)? else { return Ok(None) };
    let prefix = match fields.get(mask)? {
        Some((Literal::Prefix(bits), _)) => Some(bits),
        _ => None,
    };
    Ok(Some((Network { addr, prefix }, negated)))
}

/// A port or a range of ports. An end without a start has no effect. A range whose end is before its start matches no port.
pub(crate) fn port_range(
    fields: &Fields<'_>,
    start: Field,
    end: Field,
) -> Result<Option<(PortRange, bool)>, RulesError> {
    let Some((Literal::U16(start), negated)) = fields.get(start)? else { return Ok(None) };
    let end = match fields.get(end)? {
        Some((Literal::U16(end), _)) => Some(end.value),
        _ => None,
    };
    if negated && (start.value, end) == (0, Some(u16::MAX)) {
        return Err(fields.inexpressible(
            "match='no' with the ports 0 to 65535 leaves none: this rule could match nothing",
        ));
    }
    Ok(Some((PortRange { from: start.value, to: end }, negated)))
}

/// Like [`port_range`], but refuses a range that matches no port, as the kernel does.
pub(crate) fn filled_port_range(
    fields: &Fields<'_>,
    start: Field,
    end: Field,
) -> Result<Option<(PortRange, bool)>, RulesError> {
    let range = port_range(fields, start, end)?;
    match range {
        Some((PortRange { from, to: Some(to) }, _)) if from > to => {
            Err(fields.inexpressible(format!("the range of ports {from} to {to} is empty")))
        }
        _ => Ok(range),
    }
}
