//! Lowers Ethernet rules: one rule of the language becomes one rule in each of its directions.

use nwfilter_xml::{Action, Field, Literal, MacAddr, Protocol, Rule as XmlRule};

use crate::error::RulesError;
use crate::expand::Fields;
use crate::lower_ip::{address, filled_port_range};
use crate::packet::{EthernetTest as Test, MaskedMac, Network, StpRange};
use crate::ruleset::{EthernetRule, Match, Rule, Verdict};

/// Where bridges send spanning-tree frames (IEEE 802.1D, "bridge group address").
pub(crate) const BRIDGE_GROUP: MacAddr = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0]);

/// No frame may have this VLAN number (IEEE 802.1Q).
const RESERVED_VLAN: u32 = 4095;

/// ICMPv6 as an IP protocol.
const ICMPV6: u8 = 58;

/// The rule for one direction. `reversed` exchanges source and destination.
pub(crate) fn lower(rule: &XmlRule, fields: &Fields<'_>, reversed: bool) -> Result<EthernetRule, RulesError> {
    let mut matches = Vec::new();
    if let Some(protocol) = rule.matches.as_ref().map(|matches| matches.protocol) {
        let mut builder = Builder { fields, reversed, matches: &mut matches };
        if protocol == Protocol::Stp && reversed && fields.get(Field::SrcMac)?.is_some() {
            let why = "a spanning-tree rule for both directions cannot match a source address: \
                       write one rule for each direction";
            return Err(fields.inexpressible(why));
        }
        builder.addresses()?;
        match protocol {
            Protocol::Mac => builder.number(Field::EtherType, |n| Test::EtherType(narrow(n)))?,
            Protocol::Vlan => builder.vlan()?,
            Protocol::Stp => builder.stp()?,
            Protocol::Arp => builder.arp(0x0806)?,
            Protocol::Rarp => builder.arp(0x8035)?,
            Protocol::Ip => builder.ip(0x0800)?,
            Protocol::Ipv6 => builder.ip(0x86dd)?,
            _ => return Err(fields.inexpressible("not an Ethernet protocol")),
        }
    }
    let verdict = match rule.action {
        Action::Accept => Verdict::Accept,
        Action::Drop => Verdict::Drop,
        Action::Reject => Verdict::Reject,
        Action::Return => Verdict::Return,
        Action::Continue => Verdict::Continue,
    };
    Ok(Rule { matches, verdict, origin: fields.origin.clone() })
}

/// The low 16 bits: these fields have no more.
fn narrow(number: u32) -> u16 {
    number as u16
}

struct Builder<'a, 'f> {
    fields: &'a Fields<'f>,
    reversed: bool,
    matches: &'a mut Vec<Match<Test>>,
}

impl Builder<'_, '_> {
    /// Adds a match on the values of these attributes.
    fn push(&mut self, test: Test, negated: bool, of: &[Field]) {
        self.matches.push(Match { test, negated, variables: self.fields.variables(of) });
    }

    /// Adds a match that the element implies.
    fn push_own(&mut self, test: Test) {
        self.matches.push(Match::is(test));
    }

    /// The two tests, exchanged if the rule is reversed.
    fn pair<T>(&self, src: T, dst: T) -> (T, T) {
        if self.reversed { (dst, src) } else { (src, dst) }
    }

    fn number(&mut self, field: Field, test: impl Fn(u32) -> Test) -> Result<(), RulesError> {
        let number = match self.fields.get(field)? {
            Some((Literal::U8(n), negated)) => Some((u32::from(n.value), negated)),
            Some((Literal::U16(n), negated)) => Some((u32::from(n.value), negated)),
            Some((Literal::U32(n), negated)) => Some((n.value, negated)),
            _ => None,
        };
        if let Some((number, negated)) = number {
            self.push(test(number), negated, &[field]);
        }
        Ok(())
    }

    fn optional_number(&self, field: Field) -> Result<Option<u32>, RulesError> {
        Ok(match self.fields.get(field)? {
            Some((Literal::U8(n), _)) => Some(u32::from(n.value)),
            Some((Literal::U16(n), _)) => Some(u32::from(n.value)),
            Some((Literal::U32(n), _)) => Some(n.value),
            _ => None,
        })
    }

    fn mac(
        &mut self,
        field: Field,
        mask_field: Field,
        test: impl Fn(MaskedMac) -> Test,
    ) -> Result<(), RulesError> {
        if let Some((Literal::Mac(addr), negated)) = self.fields.get(field)? {
            let mask = match self.fields.get(mask_field)? {
                Some((Literal::Mac(MacAddr([0, 0, 0, 0, 0, 0])), _)) => {
                    let why = "a MAC mask of zeros compares nothing: leave address and mask out";
                    return Err(self.fields.inexpressible(why));
                }
                Some((Literal::Mac(mask), _)) => Some(mask),
                _ => None,
            };
            self.push(test(MaskedMac { addr, mask }), negated, &[field, mask_field]);
        }
        Ok(())
    }

    fn addresses(&mut self) -> Result<(), RulesError> {
        let (src, dst) = self.pair(Test::SrcMac as fn(_) -> _, Test::DstMac);
        self.mac(Field::SrcMac, Field::SrcMacMask, src)?;
        self.mac(Field::DstMac, Field::DstMacMask, dst)
    }

    fn vlan(&mut self) -> Result<(), RulesError> {
        if self.optional_number(Field::VlanId)? == Some(RESERVED_VLAN) {
            return Err(self.fields.inexpressible("VLAN 4095 is reserved and cannot be matched"));
        }
        self.push_own(Test::EtherType(0x8100));
        self.number(Field::VlanId, |n| Test::VlanId(narrow(n)))?;
        self.number(Field::VlanEncap, |n| Test::VlanEncap(narrow(n)))
    }

    fn stp(&mut self) -> Result<(), RulesError> {
        self.push_own(Test::DstMac(BRIDGE_GROUP.into()));
        // The kinds of the first two have 8 bits.
        self.number(Field::StpType, |n| Test::StpType(n as u8))?;
        self.number(Field::StpFlags, |n| Test::StpFlags(n as u8))?;
        self.stp_range(StpRange::RootPriority, Field::StpRootPriority, Field::StpRootPriorityHi)?;
        self.mac(Field::StpRootAddress, Field::StpRootAddressMask, Test::StpRootAddress)?;
        self.stp_range(StpRange::RootCost, Field::StpRootCost, Field::StpRootCostHi)?;
        self.stp_range(StpRange::SenderPriority, Field::StpSenderPriority, Field::StpSenderPriorityHi)?;
        self.mac(Field::StpSenderAddress, Field::StpSenderAddressMask, Test::StpSenderAddress)?;
        self.stp_range(StpRange::Port, Field::StpPort, Field::StpPortHi)?;
        self.stp_range(StpRange::MessageAge, Field::StpAge, Field::StpAgeHi)?;
        self.stp_range(StpRange::MaxAge, Field::StpMaxAge, Field::StpMaxAgeHi)?;
        self.stp_range(StpRange::HelloTime, Field::StpHelloTime, Field::StpHelloTimeHi)?;
        self.stp_range(StpRange::ForwardDelay, Field::StpForwardDelay, Field::StpForwardDelayHi)
    }

    fn stp_range(&mut self, field: StpRange, start: Field, end: Field) -> Result<(), RulesError> {
        let Some(from) = self.optional_number(start)? else { return Ok(()) };
        let to = self.optional_number(end)?;
        if let Some(to) = to.filter(|to| from > *to) {
            return Err(self.fields.inexpressible(format!("the range {from} to {to} is empty")));
        }
        let negated = matches!(self.fields.get(start)?, Some((_, true)));
        self.push(Test::StpRange { field, from, to }, negated, &[start, end]);
        Ok(())
    }

    fn arp(&mut self, ether_type: u16) -> Result<(), RulesError> {
        self.push_own(Test::EtherType(ether_type));
        self.number(Field::ArpHardwareType, |n| Test::ArpHardwareType(narrow(n)))?;
        self.number(Field::ArpOpcode, |n| Test::ArpOpcode(narrow(n)))?;
        self.number(Field::ArpProtocolType, |n| Test::ArpProtocolType(narrow(n)))?;
        self.arp_ips()?;
        let (sender, target) = self.pair(Test::ArpSrcMac as fn(_) -> _, Test::ArpDstMac);
        for (field, test) in [(Field::ArpSrcMac, sender), (Field::ArpDstMac, target)] {
            if let Some((Literal::Mac(addr), negated)) = self.fields.get(field)? {
                self.push(test(addr), negated, &[field]);
            }
        }
        if let Some((Literal::Bool(true), negated)) = self.fields.get(Field::ArpGratuitous)? {
            self.push(Test::ArpGratuitous, negated, &[Field::ArpGratuitous]);
        }
        Ok(())
    }

    /// As in libvirt, the target's address uses the sender's mask if it has none of its own.
    fn arp_ips(&mut self) -> Result<(), RulesError> {
        let (mut prefix, mut mask_fields) = (None, Vec::new());
        let (sender, target) = self.pair(Test::ArpSrcIp as fn(_) -> _, Test::ArpDstIp);
        for (field, mask_field, test) in
            [(Field::ArpSrcIp, Field::ArpSrcIpMask, sender), (Field::ArpDstIp, Field::ArpDstIpMask, target)]
        {
            let Some((Literal::Ipv4(addr), negated)) = self.fields.get(field)? else { continue };
            if let Some((Literal::Prefix(own), _)) = self.fields.get(mask_field)? {
                (prefix, mask_fields) = (Some(own), vec![mask_field]);
            }
            let of = [&[field], mask_fields.as_slice()].concat();
            self.push(test(Network { addr: addr.into(), prefix }), negated, &of);
        }
        Ok(())
    }

    fn ip(&mut self, ether_type: u16) -> Result<(), RulesError> {
        self.push_own(Test::EtherType(ether_type));
        let (src, dst) = self.pair(Test::SrcIp as fn(_) -> _, Test::DstIp);
        for (addr, mask, test) in
            [(Field::SrcIp, Field::SrcIpMask, src), (Field::DstIp, Field::DstIpMask, dst)]
        {
            if let Some((network, negated)) = address(self.fields, addr, mask)? {
                self.push(test(network), negated, &[addr, mask]);
            }
        }
        let protocol = self.fields.get(Field::IpProtocol)?;
        // The kind of the field has 8 bits.
        self.number(Field::IpProtocol, |n| Test::IpProtocol(n as u8))?;
        let negated_protocol = matches!(protocol, Some((_, true)));
        self.ports(negated_protocol)?;
        let number = match protocol {
            Some((Literal::U8(number), _)) => Some(number.value),
            _ => None,
        };
        self.icmp(number.filter(|_| !negated_protocol))?;
        // The kind of the field has 8 bits.
        self.number(Field::Dscp, |n| Test::Dscp(n as u8))
    }

    fn ports(&mut self, negated_protocol: bool) -> Result<(), RulesError> {
        let (src, dst) = self.pair(Test::SrcPort as fn(_) -> _, Test::DstPort);
        for (start, end, test) in
            [(Field::SrcPortStart, Field::SrcPortEnd, src), (Field::DstPortStart, Field::DstPortEnd, dst)]
        {
            let Some((ports, negated)) = filled_port_range(self.fields, start, end)? else { continue };
            if negated_protocol {
                let why = "ports cannot be matched together with a negated protocol: \
                           write the protocol in an element of its own without match='no'";
                return Err(self.fields.inexpressible(why));
            }
            self.push(test(ports), negated, &[start, end]);
        }
        Ok(())
    }

    /// A missing start means all types or codes; a missing end is the start.
    fn icmp(&mut self, protocol: Option<u8>) -> Result<(), RulesError> {
        let range = |start: Field, end: Field| -> Result<Option<(u8, u8)>, RulesError> {
            // The kinds of these fields have 8 bits.
            let start = self.optional_number(start)?.map(|n| n as u8);
            let end = self.optional_number(end)?.map(|n| n as u8);
            Ok((start.is_some() || end.is_some())
                .then_some((start.unwrap_or(0), end.or(start).unwrap_or(u8::MAX))))
        };
        let kinds = range(Field::IcmpType, Field::IcmpTypeEnd)?;
        let codes = range(Field::IcmpCode, Field::IcmpCodeEnd)?;
        if kinds.is_none() && codes.is_none() {
            return Ok(());
        }
        if protocol != Some(ICMPV6) {
            return Err(self.fields.inexpressible("ICMPv6 types and codes need protocol='icmpv6'"));
        }
        let (kinds, codes) = (kinds.unwrap_or((0, u8::MAX)), codes.unwrap_or((0, u8::MAX)));
        if kinds.0 > kinds.1 || codes.0 > codes.1 {
            return Err(self.fields.inexpressible("a range of ICMPv6 types or codes is empty"));
        }
        let negated = matches!(self.fields.get(Field::IcmpType)?, Some((_, true)));
        let of = [Field::IcmpType, Field::IcmpTypeEnd, Field::IcmpCode, Field::IcmpCodeEnd];
        self.push(Test::IcmpRange { kinds, codes }, negated, &of);
        Ok(())
    }
}
