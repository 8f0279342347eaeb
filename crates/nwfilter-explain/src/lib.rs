//! Explains which rule of a port decides a packet, and why, by evaluating a [`Ruleset`](nwfilter_rules::Ruleset).
//!
//! An [`Explainer`] takes a sequence of packets, as bytes ([`Packet::parse`]), fields or words ([`Question`]). For each it says
//! whether the packet passes, which rule decides, what every evaluated rule compared, and which rule came close. It does no
//! I/O and asks no kernel.
//!
//! The reference is what the kernel does with the rules of ebtables, iptables and ip6tables:
//!
//! * A frame from the guest meets the Ethernet rules first, then the IP rules; one to the guest the other way round.
//! * Accepting in a chain of Ethernet rules ends the Ethernet rules of this port.
//! * IP rules see IPv4 and IPv6 without a VLAN tag. They see fragments reassembled.
//! * A [`Tracker`] tracks connections as conntrack does, with helpers for FTP and TFTP. A caller can set a state instead.
//!
//! ```
//! use std::collections::BTreeMap;
//! use nwfilter_explain::{Explainer, Guest, Outcome, Question};
//!
//! let filter = nwfilter_xml::read_filter("web.xml", "<filter name='web'>
//!   <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
//!   <rule action='drop' direction='inout'><all/></rule>
//! </filter>").into_result()?;
//! let binding = nwfilter_xml::read_binding("b.xml", "<filterbinding>
//!   <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
//!   <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='web'/>
//! </filterbinding>").into_result()?;
//! let filters = BTreeMap::from([(filter.name.clone(), filter)]);
//! let ruleset = nwfilter_rules::instantiate(&filters, &binding)?;
//!
//! let guest = Guest::of(&binding, &ruleset);
//! let question = Question::read(&guest, &["in", "tcp", "from", "192.0.2.7:40000", "to", ":443"])?;
//! let explained = Explainer::new(&ruleset).explain(question.way, &question.packet)?;
//! assert_eq!(explained.outcome, Outcome::Dropped);
//! assert_eq!(explained.deciding().map(|step| step.origin.to_string()), Some("web:3".to_owned()));
//! assert_eq!(
//!     explained.nearest.map(|near| near.to_string()),
//!     Some("web:2 would let it pass if the destination port were 80".to_owned())
//! );
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod compare;
mod connection;
mod conversation;
mod evaluate;
mod packet;
mod parse;
mod pcap;
mod question;
mod sets;
mod words;

pub use connection::{Connection, State, Tracker};
pub use conversation::{Conversation, Told, Turn};
pub use evaluate::{Explainer, Explanation, NearMiss, Outcome, Step, StepKind, Tested, Unanswerable, Way};
pub use nwfilter_rules::Layer;
pub use packet::{
    Arp, Body, Fragment, Icmp, Ip, Packet, Stp, Tcp, Transport, ether_type, protocol, tcp_flag,
};
pub use parse::TooShort;
pub use pcap::{BadCapture, frames};
pub use question::{BadQuestion, Guest, Question};
pub use sets::{IpSets, NoElement};
