//! What this crate sends is what nft sends for the same: compared with the messages that `nft --debug=mnl` shows.

use std::sync::Arc;

use nix::libc;
use nwfilter_testlab::{Host, Need, skip_unless};

use super::batch::{Batch, Ending};
use super::expr::{
    Byteorder, Connlimit, CtKey, Direction, Expr, Extended, ExtensionPart, Limit, LimitOf, Load, Log, LogTo,
    MetaKey, Order, Register, Reject, Relation, Stateful, Verdict, state,
};
use super::wire::{Head, Writer, messages};
use super::*;

/// A message as far as it says what to do: type, family and attributes.
type Sent = (u16, u8, Vec<Tree>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Tree {
    Leaf(u16, Vec<u8>),
    Nest(u16, Vec<Tree>),
}

/// `NLA_F_NESTED`
const NESTED: u16 = 0x8000;

fn tree(mut bytes: &[u8]) -> Vec<Tree> {
    let mut found = Vec::new();
    while let [a, b, c, d, ..] = *bytes {
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = &bytes[4..len];
        found.push(if kind & NESTED != 0 {
            Tree::Nest(kind & !NESTED, tree(value))
        } else {
            Tree::Leaf(kind, value.to_vec())
        });
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Leaves out the numbers that sets have within a transaction, and what nft 1.0 and 1.1 do not agree on.
fn essential((kind, family, mut attributes): Sent) -> Sent {
    match i32::from(kind) & 0xff {
        libc::NFT_MSG_NEWSET => attributes.retain(|attribute| match attribute {
            // NFTA_SET_ID, NFTA_SET_USERDATA: see `nft_lists_what_was_written`.
            Tree::Leaf(kind, _) => !matches!(kind, 10 | 13),
            Tree::Nest(..) => true,
        }),
        // NFTA_SET_ELEM_LIST_SET_ID
        libc::NFT_MSG_NEWSETELEM => attributes.retain(|attribute| !matches!(attribute, Tree::Leaf(4, _))),
        libc::NFT_MSG_NEWRULE => {
            for attribute in &mut attributes {
                if let Tree::Nest(_, exprs) = attribute {
                    exprs.iter_mut().for_each(without_set_id);
                }
            }
        }
        // The name of the helper, which nft sends without the NUL behind it.
        libc::NFT_MSG_NEWOBJ => {
            for attribute in &mut attributes {
                if let Tree::Nest(4, data) = attribute
                    && let [Tree::Leaf(1, name), ..] = &mut data[..]
                {
                    name.retain(|byte| *byte != 0);
                }
            }
        }
        _ => {}
    }
    (kind, family, attributes)
}

fn without_set_id(expr: &mut Tree) {
    let Tree::Nest(_, parts) = expr else { return };
    let [Tree::Leaf(1, name), Tree::Nest(2, data)] = &mut parts[..] else { return };
    // NFTA_BITWISE_OP, which nft leaves out at times where it is 0.
    if name == b"bitwise\0" {
        data.retain(|attribute| *attribute != Tree::Leaf(6, vec![0; 4]));
    }
    // The name of an object, which nft sends without the NUL behind it.
    if let (b"objref\0", [_, Tree::Leaf(2, name)]) = (&name[..], &mut data[..]) {
        name.retain(|byte| *byte != 0);
    }
    let id = match &name[..] {
        b"lookup\0" => 4,
        b"dynset\0" => 2,
        b"objref\0" => 5,
        _ => return,
    };
    data.retain(|attribute| !matches!(attribute, Tree::Leaf(kind, _) if *kind == id));
}

/// The messages that nft sends for a ruleset.
fn sent_by_nft(host: &Host, ruleset: &str) -> anyhow::Result<Vec<Sent>> {
    // It shows them also where the kernel lacks a module for one.
    let out =
        host.run_with_stdin(&["sh", "-c", "nft --check --debug=mnl -f - 2>/dev/null; true"], ruleset)?;
    let mut sent: Vec<Sent> = Vec::new();
    let mut current: Option<(u16, Option<u8>, Vec<u8>)> = None;
    for line in out.lines() {
        // Colours.
        let line: String = line
            .split('\u{1b}')
            .enumerate()
            .map(|(index, part)| match (index, part.split_once('m')) {
                (1.., Some((_, rest))) => rest,
                _ => part,
            })
            .collect();
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        match &cells[..] {
            ["", kind, flags, "", "type", "flags", ""] if flags.len() == 4 => {
                current = Some((kind.parse()?, None, vec![]))
            }
            ["", hex, "", "extra header", ""] => {
                if let Some((_, family, _)) = &mut current {
                    *family = Some(u8::from_str_radix(&hex[..2], 16)?);
                }
            }
            ["", len, flags, kind, "", "len", "flags", "type", ..] => {
                if let Some((_, _, bytes)) = &mut current {
                    let nested = if flags.starts_with('N') { NESTED } else { 0 };
                    bytes.extend(len.parse::<u16>()?.to_ne_bytes());
                    bytes.extend((kind.parse::<u16>()? | nested).to_ne_bytes());
                }
            }
            ["", hex, "", "data", ..] => {
                if let Some((_, _, bytes)) = &mut current {
                    for byte in hex.split_whitespace() {
                        bytes.push(u8::from_str_radix(byte, 16)?);
                    }
                }
            }
            // One such line stands behind the header, too.
            [rule] if rule.starts_with("----") => {
                if let Some((kind, Some(family), bytes)) = current.take_if(|(_, family, _)| family.is_some())
                {
                    sent.push((kind, family, tree(&bytes)));
                }
            }
            _ => {}
        }
    }
    sent.retain(|(kind, ..)| is_change(*kind));
    anyhow::ensure!(!sent.is_empty(), "nft shows no messages: {out}");
    Ok(sent.into_iter().map(essential).collect())
}

fn is_change(kind: u16) -> bool {
    let new = [
        libc::NFT_MSG_NEWTABLE,
        libc::NFT_MSG_NEWCHAIN,
        libc::NFT_MSG_NEWRULE,
        libc::NFT_MSG_NEWSET,
        libc::NFT_MSG_NEWSETELEM,
        libc::NFT_MSG_NEWOBJ,
    ];
    i32::from(kind >> 8) == libc::NFNL_SUBSYS_NFTABLES && new.contains(&(i32::from(kind) & 0xff))
}

/// The messages of this crate.
fn sent_by_us(transaction: &Transaction) -> anyhow::Result<Vec<Sent>> {
    let batch = Batch::new(transaction, None, 1, Ending::Commit)?;
    let mut sent = Vec::new();
    for message in messages(batch.bytes()) {
        let message = message?;
        if is_change(message.kind) {
            let (family, attributes) = message.family()?;
            sent.push(essential((message.kind, family, tree(attributes.0))));
        }
    }
    Ok(sent)
}

fn meta(key: MetaKey) -> Load {
    Load::Meta(key)
}

fn ip4(rule: Rule) -> Rule {
    rule.equal(meta(MetaKey::Nfproto), [2])
}

fn ip6(rule: Rule) -> Rule {
    rule.equal(meta(MetaKey::Nfproto), [10])
}

fn tcp(rule: Rule) -> Rule {
    rule.equal(field::L4PROTO, [6])
}

fn state_is(bits: u32) -> Rule {
    Rule::new().masked(field::CT_STATE, bits.to_ne_bytes(), Relation::NotEqual, [0; 4])
}

fn constant(value: impl Into<Vec<u8>>) -> Rule {
    Rule::new().expr(Expr::Immediate { value: value.into(), dreg: Register::FIRST })
}

/// Rules of an inet table, in nft's words and in ours.
fn inet_rules() -> Vec<(&'static str, Rule)> {
    let accept = |rule: Rule| rule.verdict(Verdict::Accept);
    let new = Rule::new;
    let sreg = Register::FIRST;
    let option = |part| Load::Extension { of: Extended::Tcp, kind: 2, part };
    let prefix = |text: &str| Some(text.to_string());
    vec![
        (
            "add @src { ip saddr ct count over 3 } drop",
            ip4(new())
                .connlimit_by(&[field::IP_SADDR], &"src".parse().unwrap(), Connlimit { count: 3, over: true })
                .verdict(Verdict::Drop),
        ),
        ("ct count over 3 drop", new().connlimit(Connlimit { count: 3, over: true }).verdict(Verdict::Drop)),
        ("ct count 3 accept", accept(new().connlimit(Connlimit { count: 3, over: false }))),
        ("ct state established,related accept", accept(state_is(state::ESTABLISHED | state::RELATED))),
        ("ct state new ct helper set \"ftp-std\"", state_is(state::NEW).object(&ftp())),
        ("ct direction original accept", accept(new().equal(field::CT_DIRECTION, [0]))),
        (
            "limit rate 5/second burst 10 packets accept",
            accept(new().limit(Limit { rate: 5, seconds: 1, burst: 10, of: LimitOf::Packets, over: false })),
        ),
        (
            "limit rate over 5 kbytes/minute burst 7 bytes accept",
            accept(new().limit(Limit { rate: 5120, seconds: 60, burst: 7, of: LimitOf::Bytes, over: true })),
        ),
        (
            "log prefix \"abc \" level info",
            new().log(Log { prefix: prefix("abc "), to: LogTo::Syslog { level: 6, flags: 0 } }),
        ),
        (
            "log group 3 snaplen 20 queue-threshold 4",
            new().log(Log {
                prefix: None,
                to: LogTo::Group { group: 3, snaplen: Some(20), threshold: Some(4) },
            }),
        ),
        (
            "tcp flags & (syn|ack|fin) == syn|ack accept",
            accept(tcp(new()).masked(field::TCP_FLAGS, [0x13], Relation::Equal, [0x12])),
        ),
        (
            "tcp flags & (syn|ack) != syn accept",
            accept(tcp(new()).masked(field::TCP_FLAGS, [0x12], Relation::NotEqual, [0x02])),
        ),
        ("tcp option maxseg exists accept", accept(new().equal(option(ExtensionPart::Present), [1]))),
        (
            "tcp option maxseg size 1400 accept",
            accept(new().equal(option(ExtensionPart::Bytes { offset: 2, len: 2 }), 1400u16.to_be_bytes())),
        ),
        (
            "exthdr hbh exists accept",
            accept(
                ip6(new()).equal(
                    Load::Extension { of: Extended::Ipv6, kind: 0, part: ExtensionPart::Present },
                    [1],
                ),
            ),
        ),
        ("ip dscp 10 accept", accept(ip4(new()).masked(field::IP_TOS, [0xfc], Relation::Equal, [40]))),
        (
            "ip saddr 10.0.0.0/25 accept",
            accept(ip4(new()).masked(field::IP_SADDR, [255, 255, 255, 128], Relation::Equal, [10, 0, 0, 0])),
        ),
        (
            "ip saddr 10.0.0.5-10.0.0.7 accept",
            accept(ip4(new()).range(field::IP_SADDR, false, [10, 0, 0, 5], [10, 0, 0, 7])),
        ),
        (
            "ip saddr != 10.0.0.5-10.0.0.7 accept",
            accept(ip4(new()).range(field::IP_SADDR, true, [10, 0, 0, 5], [10, 0, 0, 7])),
        ),
        ("ip ttl < 5 accept", accept(ip4(new()).cmp(field::IP_TTL, Relation::Less, [5]))),
        ("ip ttl >= 5 accept", accept(ip4(new()).cmp(field::IP_TTL, Relation::GreaterOrEqual, [5]))),
        (
            "meta mark 5-7 accept",
            accept(new().range(field::MARK, false, 5u32.to_be_bytes(), 7u32.to_be_bytes())),
        ),
        ("meta mark set 5", constant(5u32.to_ne_bytes()).expr(Expr::MetaSet { key: MetaKey::Mark, sreg })),
        (
            "ct zone set 5",
            constant(5u16.to_ne_bytes()).expr(Expr::CtSet { key: CtKey::Zone, sreg, direction: None }),
        ),
        (
            "ct original zone set 5",
            constant(5u16.to_ne_bytes()).expr(Expr::CtSet {
                key: CtKey::Zone,
                sreg,
                direction: Some(Direction::Original),
            }),
        ),
        ("notrack", new().expr(Expr::Notrack)),
        ("meta pkttype host accept", accept(new().equal(meta(MetaKey::Pkttype), [0]))),
        (
            "th dport 100-200 accept",
            accept(new().range(field::DPORT, false, 100u16.to_be_bytes(), 200u16.to_be_bytes())),
        ),
        (
            "meta mark set iifname map @mk",
            new()
                .map(&[field::IIFNAME], &"mk".parse().unwrap())
                .expr(Expr::MetaSet { key: MetaKey::Mark, sreg }),
        ),
        (
            "ip frag-off & 0x3fff != 0 accept",
            accept(ip4(new()).masked(field::IP_FRAG_OFF, [0x3f, 0xff], Relation::NotEqual, [0, 0])),
        ),
        ("reject", new().reject(Reject::Icmpx(1))),
        ("reject with tcp reset", tcp(new()).reject(Reject::TcpReset)),
        ("reject with icmpv6 addr-unreachable", ip6(new()).reject(Reject::Unreachable(3))),
        ("counter comment \"a comment\"", new().counter().comment(Comment::new("a comment"))),
    ]
}

/// Rules of a bridge table, in nft's words and in ours.
fn bridge_rules() -> Vec<(&'static str, Rule)> {
    let new = Rule::new;
    let accept = |rule: Rule| rule.verdict(Verdict::Accept);
    vec![
        (
            "iifname . ether saddr @mac counter accept",
            accept(new().is_in(&[field::IIFNAME, field::ETHER_SADDR], &"mac".parse().unwrap()).counter()),
        ),
        (
            "iifname . ether saddr != @mac drop",
            new()
                .is_not_in(&[field::IIFNAME, field::ETHER_SADDR], &"mac".parse().unwrap())
                .verdict(Verdict::Drop),
        ),
        ("iifname vmap @ports", new().vmap(&[field::IIFNAME], &"ports".parse().unwrap())),
        (
            "ether type arp goto leaf",
            new().equal(field::ETHER_TYPE, [8, 6]).verdict(Verdict::Goto("leaf".parse().unwrap())),
        ),
        (
            "ether type 0x8035 jump leaf",
            new().equal(field::ETHER_TYPE, [0x80, 0x35]).verdict(Verdict::Jump("leaf".parse().unwrap())),
        ),
        (
            "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 return",
            new()
                .masked(
                    field::ETHER_DADDR,
                    [0xff, 0xff, 0xff, 0xff, 0xff, 0xf0],
                    Relation::Equal,
                    [1, 0x80, 0xc2, 0, 0, 0],
                )
                .verdict(Verdict::Return),
        ),
        (
            "arp operation 1 arp saddr ip 10.0.0.1 accept",
            accept(
                new()
                    .equal(field::ETHER_TYPE, [8, 6])
                    .equal(field::ARP_OPERATION, [0, 1])
                    .equal(field::ARP_SADDR_IP, [10, 0, 0, 1]),
            ),
        ),
        (
            "meta pkttype multicast continue",
            new().equal(meta(MetaKey::Pkttype), [2]).verdict(Verdict::Continue),
        ),
    ]
}

/// Rules of a bridge table that need a module of their own, which not every kernel has.
fn bridge_module_rules() -> Vec<(&'static str, Rule)> {
    let new = Rule::new;
    vec![
        (
            "ct zone set jhash meta ibrname mod 65535 seed 0x7 offset 1",
            Rule::new().jhash(field::IBRNAME, 65535, 7, 1).expr(Expr::CtSet {
                key: CtKey::Zone,
                sreg: Register::FIRST,
                direction: None,
            }),
        ),
        (
            "meta ibrname \"br0\" accept",
            new().equal(field::IBRNAME, field::ifname("br0").unwrap()).verdict(Verdict::Accept),
        ),
        (
            "ether type ip reject with icmp admin-prohibited",
            new().equal(field::ETHER_TYPE, [8, 0]).reject(Reject::Unreachable(13)),
        ),
    ]
}

fn ftp() -> Object {
    Object::CtHelper(CtHelper {
        name: "ftp-std".parse().unwrap(),
        helper: "ftp".into(),
        protocol: 6,
        l3proto: None,
        comment: None,
    })
}

fn set(name: &str, key: &[Datatype]) -> Set {
    Set::new(name.parse().unwrap(), key)
}

/// A table of either family with all that this crate writes, in nft's words and in ours.
fn inet() -> (String, Transaction) {
    let table = TableId::inet("t".parse().unwrap());
    let source = Set {
        size: Some(65535),
        flags: SetFlags { dynamic: true, ..SetFlags::default() },
        ..set("src", &[Datatype::Ipv4Addr])
    };
    let marks = Set::map("mk".parse().unwrap(), [Datatype::Ifname], MapData::Value(Datatype::Mark));
    let mut rules = String::new();
    let mut ours = Transaction::new();
    begin(&mut ours, &table, Hook::Prerouting, -150, Policy::Accept);
    ours.push(Operation::AddObject { table: table.clone(), object: ftp() }, ());
    for set in [source, marks] {
        ours.push(Operation::AddSet { table: table.clone(), set: Arc::new(set) }, ());
    }
    add_rules(&mut ours, &table, inet_rules(), &mut rules);
    let text = format!(
        "table inet t {{ ct helper ftp-std {{ type \"ftp\" protocol tcp; }}
         set src {{ type ipv4_addr; size 65535; flags dynamic; }}
         map mk {{ type ifname : mark; }}
         chain base {{ type filter hook prerouting priority -150; policy accept; {rules} }}
}}"
    );
    (text, ours)
}

fn begin(ours: &mut Transaction, table: &TableId, hook: Hook, priority: i32, policy: Policy) {
    ours.push(Operation::AddTable { table: table.clone(), flags: TableFlags::default() }, ());
    let base = BaseChain { kind: ChainType::Filter, hook, priority, policy };
    let chain = Chain { name: "base".parse().unwrap(), base: Some(base) };
    ours.push(Operation::AddChain { table: table.clone(), chain }, ());
}

fn add_rules(ours: &mut Transaction, table: &TableId, rules: Vec<(&str, Rule)>, text: &mut String) {
    for (words, rule) in rules {
        text.push_str(words);
        text.push('\n');
        let chain = "base".parse().unwrap();
        ours.push(Operation::AddRule { table: table.clone(), chain, place: Place::End, rule }, ());
    }
}

fn bridge(rules_given: Vec<(&str, Rule)>) -> (String, Transaction) {
    let table = TableId::bridge("t".parse().unwrap());
    let port = |name: &str| field::ifname(name).unwrap();
    let mac = Set {
        size: Some(100),
        comment: Some(Comment::new("MAC")),
        ..set("mac", &[Datatype::Ifname, Datatype::EtherAddr])
    };
    let ports = Set::map("ports".parse().unwrap(), [Datatype::Ifname], MapData::Verdict);
    let services = set("services", &[Datatype::Ifname, Datatype::InetService]).interval();
    let nets = set("nets", &[Datatype::Ipv4Addr]).interval();
    let sets = [mac, ports, services, nets].map(Arc::new);
    let mut rules = String::new();
    let mut ours = Transaction::new();
    begin(&mut ours, &table, Hook::Prerouting, 10, Policy::Drop);
    ours.push(
        Operation::AddChain { table: table.clone(), chain: Chain::regular("leaf".parse().unwrap()) },
        (),
    );
    for set in &sets {
        ours.push(Operation::AddSet { table: table.clone(), set: set.clone() }, ());
    }
    let with_comment = Element {
        comment: Some(Comment::new("first")),
        ..Element::new(ElementKey::one(&[&port("vnet0")[..], &[0x52, 0x54, 0, 1, 2, 3]]))
    };
    let elements = [
        (0, vec![with_comment]),
        (
            1,
            vec![Element::with(
                ElementKey::one(&[port("vnet0")]),
                ElementValue::Verdict(Verdict::Goto("leaf".parse().unwrap())),
            )],
        ),
        (
            2,
            vec![Element::new(ElementKey::range(
                &[&port("vnet0")[..], &[0, 100]],
                &[&port("vnet0")[..], &[0, 200]],
            ))],
        ),
        (
            3,
            vec![
                Element::new(ElementKey::Range(vec![10, 0, 0, 0], vec![10, 0, 0, 255])),
                Element::new(ElementKey::One(vec![10, 1, 0, 5])),
                Element::new(ElementKey::Range(vec![224, 0, 0, 0], vec![255; 4])),
            ],
        ),
    ];
    for (index, elements) in elements {
        ours.push(Operation::AddElements { table: table.clone(), set: sets[index].clone(), elements }, ());
    }
    add_rules(&mut ours, &table, rules_given, &mut rules);
    let text = format!(
        "table bridge t {{
         set mac {{ type ifname . ether_addr; size 100; comment \"MAC\"; elements = {{ \"vnet0\" . 52:54:00:01:02:03 comment \"first\" }} }}
         map ports {{ type ifname : verdict; }}
         set services {{ type ifname . inet_service; flags interval; elements = {{ \"vnet0\" . 100-200 }} }}
         set nets {{ type ipv4_addr; flags interval; elements = {{ 10.0.0.0/24, 10.1.0.5, 224.0.0.0/3 }} }}
         chain leaf {{ }}
         chain base {{ type filter hook prerouting priority 10; policy drop; {rules} }}
         }}
         add element bridge t ports {{ \"vnet0\" : goto leaf }}"
    );
    (text, ours)
}

/// nft sends an end before the first range of a set, too, and a range up to the last key in its own way.
fn without_first_end(mut sent: Vec<Sent>) -> Vec<Sent> {
    let zero = [Tree::Leaf(3, vec![0, 0, 0, 1]), Tree::Nest(1, vec![Tree::Leaf(1, vec![0; 4])])];
    for (kind, _, attributes) in &mut sent {
        if i32::from(*kind) & 0xff != libc::NFT_MSG_NEWSETELEM {
            continue;
        }
        for attribute in attributes {
            let Tree::Nest(3, list) = attribute else { continue };
            list.retain(|element| !matches!(element, Tree::Nest(_, parts) if parts[..] == zero));
            // nft counts the elements by the kind of their attribute, the kernel does not look at it.
            for element in list {
                let Tree::Nest(kind, parts) = element else { continue };
                *kind = 1;
                // NFTNL_UDATA_SET_ELEM_FLAGS with SET_ELEM_F_INTERVAL_OPEN.
                parts.retain(|part| *part != Tree::Leaf(6, vec![1, 4, 1, 0, 0, 0]));
            }
        }
    }
    sent.sort_by_key(|(kind, _, attributes)| (*kind, format!("{attributes:?}")));
    sent
}

#[test]
fn messages_are_those_of_nft() -> anyhow::Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let host = Host::new()?;
    let with_modules = [bridge_rules(), bridge_module_rules()].concat();
    for (text, ours) in [inet(), bridge(with_modules)] {
        let (nft, ours) =
            (without_first_end(sent_by_nft(&host, &text)?), without_first_end(sent_by_us(&ours)?));
        for (nft, ours) in nft.iter().zip(&ours) {
            assert_eq!(nft, ours);
        }
        assert_eq!(nft.len(), ours.len());
    }
    Ok(())
}

#[test]
fn what_nft_wrote_is_read_as_what_we_write() -> anyhow::Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    for (id, (text, ours)) in
        [(TableId::inet("t".parse()?), inet()), (TableId::bridge("t".parse()?), bridge(bridge_rules()))]
    {
        let host = Host::new()?;
        host.run_with_stdin(&["nft", "-f", "-"], &text)?;
        let (nft, written) = host.enter(|| -> anyhow::Result<_> {
            let mut connection = Connection::open()?;
            let nft = connection.table(&id)?;
            let mut transaction = Transaction::new();
            transaction.push(Operation::DeleteTable { table: id.clone() }, ());
            connection.commit(&transaction, None)?;
            connection.commit(&ours, None)?;
            Ok((nft, connection.table(&id)?))
        })?;
        let (nft, written) = (nft.unwrap(), written.unwrap());
        assert_eq!(nft.sets, written.sets);
        assert_eq!(nft.objects, written.objects);
        assert_eq!(nft.chains.keys().collect::<Vec<_>>(), written.chains.keys().collect::<Vec<_>>());
        let rules = |table: &InstalledTable| -> Vec<Rule> {
            table.chains.values().flat_map(|chain| &chain.rules).map(|rule| rule.rule.clone()).collect()
        };
        for (nft, written) in rules(&nft).iter().zip(rules(&written)) {
            assert_eq!(*nft, written);
        }
        // What was written is what is read.
        let wanted: Vec<Rule> = ours
            .operations()
            .iter()
            .filter_map(|(operation, ())| match operation {
                Operation::AddRule { rule, .. } => Some(rule.clone()),
                _ => None,
            })
            .collect();
        for (written, wanted) in rules(&written).iter().zip(&wanted) {
            assert_eq!(written, wanted);
        }
        assert_eq!(rules(&written).len(), wanted.len());
        for (operation, ()) in ours.operations() {
            match operation {
                Operation::AddSet { set, .. } => assert_eq!(written.sets[&set.name].set, **set),
                Operation::AddElements { set, elements, .. } => {
                    let read = written.sets[&set.name].elements.iter().map(|element| &element.element);
                    assert!(read.eq(elements), "{}", set.name);
                }
                _ => {}
            }
        }
        let listed = host.run(&["nft", "list", "ruleset"])?;
        // nft reads back what it lists of our table.
        host.run_with_stdin(&["nft", "-c", "-f", "-"], &listed)?;
    }
    Ok(())
}

#[test]
fn byte_order_hashes_and_raw_expressions_are_written() {
    let order = Byteorder { sreg: Register::FIRST, dreg: Register::FIRST, to: Order::Host, len: 4, size: 2 };
    let raw = Expr::Other { name: "fib".into(), data: vec![8, 0, 1, 0, 0, 0, 0, 1] };
    let [_, hash] = &Rule::new().jhash(field::IBRNAME, 65535, 7, 1).exprs[..] else { panic!() };
    let mut writer = Writer::default();
    let head = Head { kind: 0, flags: 0, sequence: 0, family: 0, resource: 0 };
    writer.message(head, |w| {
        for expr in [&Expr::Byteorder(order), &Expr::Stateful(Stateful::Counter), &raw, hash] {
            super::expr_wire::put_expr(w, expr);
        }
    });
    let message = messages(writer.bytes()).next().unwrap().unwrap();
    let mut counts = Vec::new();
    let read = super::expr_wire::read_exprs(message.family().unwrap().1, &mut counts).unwrap();
    assert_eq!(read[0], Expr::Byteorder(order));
    assert_eq!(counts, [Count::default()]);
    assert_eq!(read[2..], [raw, hash.clone()]);
}
