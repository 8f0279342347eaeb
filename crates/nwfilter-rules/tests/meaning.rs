//! What filters mean: the rules that come of them, as one line each.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use nwfilter_rules::{
    CTRL_CT_HELPERS, EthernetSide, IpTest, Match, RootEntry, Rule, RulesError, Ruleset, includes_itself,
    instantiate, reachable,
};
use nwfilter_xml::{Filter, FilterName, Params, read_binding, read_filter};
use serde::Serialize;

type Filters = BTreeMap<FilterName, Filter>;

/// Filters from documents; the port is bound to the first.
fn filters(documents: &[&str]) -> Filters {
    let read = |text: &&str| read_filter("filter.xml", text).into_result().unwrap();
    documents.iter().map(read).map(|filter| (filter.name.clone(), filter)).collect()
}

fn ruleset_of(filters: &Filters, name: &str, params: &[(&str, &str)]) -> Result<Ruleset, RulesError> {
    let mut binding = read_binding(
        "binding.xml",
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>",
    )
    .into_result()
    .unwrap();
    binding.filter = name.parse().unwrap();
    binding.params = Params::new();
    for (name, value) in params {
        binding.params.insert(name.parse().unwrap(), value).unwrap();
    }
    instantiate(filters, &binding)
}

fn ruleset(document: &str, params: &[(&str, &str)]) -> Ruleset {
    ruleset_of(&filters(&[document]), "f", params).unwrap()
}

fn refusal(document: &str, params: &[(&str, &str)]) -> String {
    ruleset_of(&filters(&[document]), "f", params).unwrap_err().to_string()
}

/// A rule's matches as JSON and its verdict.
fn shown_rule<T: Serialize>(rule: &Rule<T>) -> String {
    format!(
        "{} {}  ({})",
        shown_matches(&rule.matches),
        serde_json::to_string(&rule.verdict).unwrap(),
        rule.origin
    )
}

fn shown_matches<T: Serialize>(matches: &[Match<T>]) -> String {
    let tests = matches.iter().map(|test| serde_json::to_string(test).unwrap().replace('"', ""));
    tests.collect::<Vec<_>>().join(" ")
}

fn shown(ruleset: &Ruleset) -> String {
    let mut out = String::new();
    let mut list = |title: &str, rules: Vec<String>| {
        writeln!(out, "{title}:").unwrap();
        rules.iter().for_each(|rule| writeln!(out, "  {rule}").unwrap());
    };
    for (title, side) in
        [("from guest", &ruleset.ethernet.from_guest), ("to guest", &ruleset.ethernet.to_guest)]
    {
        let Some(EthernetSide { root, chains, .. }) = side else { continue };
        let entry = |entry: &RootEntry| match entry {
            RootEntry::Rule(rule) => shown_rule(rule),
            RootEntry::Jump(jump) => format!("{} → {}", shown_matches(&jump.matches), jump.chain),
        };
        list(&format!("frames {title}"), root.iter().map(entry).collect());
        for chain in chains {
            list(&format!("frames {title}, {}", chain.name), chain.rules.iter().map(shown_rule).collect());
        }
    }
    for (family, part) in [("IPv4", &ruleset.ipv4), ("IPv6", &ruleset.ipv6)] {
        let Some(part) = part else { continue };
        for (title, rules) in [("from guest", &part.from_guest), ("to guest", &part.to_guest)] {
            list(&format!("{family} {title}"), rules.iter().map(shown_rule).collect());
        }
    }
    if !ruleset.guest_addresses.is_empty() {
        list("guest addresses", ruleset.guest_addresses.iter().map(ToString::to_string).collect());
    }
    if !ruleset.helpers.is_empty() {
        let helpers =
            ruleset.helpers.iter().map(|helper| serde_json::to_string(helper).unwrap().replace('"', ""));
        list("helpers", helpers.collect());
    }
    out
}

fn fixtures() -> Filters {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures");
    let files = ["seed", "stock"].into_iter().flat_map(|dir| fs::read_dir(root.join(dir)).unwrap());
    let texts: Vec<_> = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    filters(&texts.iter().map(String::as_str).collect::<Vec<_>>())
}

// ---- the seed ----

#[test]
fn the_seed_filters_by_port_and_by_state() {
    let filters = fixtures();
    for name in ["ftp-by-port", "ftp-by-state"] {
        assert_snapshot!(name, shown(&ruleset_of(&filters, name, &[("IP", "10.0.0.2")]).unwrap()));
    }
}

#[test]
fn a_ruleset_is_json_without_the_words_of_any_tool() {
    let ruleset = ruleset(
        "<filter name='f' chain='ipv4'>
           <rule action='drop' direction='out'><ip match='no' srcipaddr='$IP'/></rule>
           <rule action='accept' direction='in'><tcp dstportstart='22' srcmacaddr='$MAC'/></rule>
         </filter>",
        &[("IP", "10.0.0.2")],
    );
    assert_snapshot!(serde_json::to_string_pretty(&ruleset).unwrap());
}

#[test]
fn a_ruleset_reads_back_from_its_json() {
    let filters = fixtures();
    let params =
        [("IP", "10.0.0.2"), ("IPV6", "fe80::1"), ("GATEWAY_MAC", "2:0:0:0:0:1"), ("DHCPSERVER", "10.0.0.1")];
    let mut read = 0;
    for name in filters.keys() {
        let Ok(ruleset) = ruleset_of(&filters, name.as_str(), &params) else { continue };
        let json = serde_json::to_string(&ruleset).unwrap();
        assert_eq!(serde_json::from_str::<Ruleset>(&json).unwrap(), ruleset, "{name}");
        read += 1;
    }
    assert!(read > 20, "{read}");
    let rules = "<rule action='reject' direction='out'><stp root-cost='1' root-cost-hi='2' srcmacaddr='1:2:3:4:5:6'/></rule>
         <rule action='drop' direction='out'><arp match='no' gratuitous='true' arpsrcipaddr='$A[1]'/></rule>
         <rule action='accept' direction='in'><tcp flags='SYN,ACK/SYN' option='3' ipset='s' ipsetflags='src,dst'
           connlimit-above='3' comment='c' srcipaddr='$A[@2]'/></rule>";
    let params = [("A", "10.0.0.1"), ("A", "10.0.0.2")];
    let ruleset = ruleset(&format!("<filter name='f'>{rules}</filter>"), &params);
    let json = serde_json::to_string(&ruleset).unwrap();
    assert_eq!(serde_json::from_str::<Ruleset>(&json).unwrap(), ruleset);
}

// ---- IP rules ----

#[test]
fn an_ip_rule_becomes_up_to_two_lines() {
    let mut out = String::new();
    for (title, rule, element) in [
        ("accept", "action='accept'", "<tcp srcipaddr='10.0.0.1' dstportstart='22'/>"),
        ("drop", "action='drop'", "<tcp srcipaddr='10.0.0.1' dstportstart='22'/>"),
        ("with a state", "action='drop'", "<tcp dstportstart='22' state='NEW,RELATED'/>"),
        ("state NONE", "action='accept'", "<tcp dstportstart='22' state='NONE'/>"),
        ("without state matching", "action='accept' statematch='0'", "<tcp dstportstart='22' state='NEW'/>"),
        ("an ICMP type", "action='accept'", "<icmp type='8' code='0'/>"),
        ("ICMP without a type", "action='accept'", "<icmp/>"),
        ("nothing but a MAC", "action='accept'", "<all srcmacaddr='1:2:3:4:5:6'/>"),
        ("a MAC and more", "action='accept'", "<all srcmacaddr='1:2:3:4:5:6' dscp='9'/>"),
        ("connlimit", "action='accept'", "<tcp connlimit-above='3'/>"),
        ("connlimit that drops", "action='drop'", "<tcp connlimit-above='3' match='no'/>"),
        ("an ipset", "action='accept'", "<all ipset='web' ipsetflags='src,dst,dst'/>"),
        ("ranges", "action='reject'", "<udp srcipfrom='10.0.0.1' srcipto='10.0.0.9' dstipfrom='10.1.0.1'/>"),
        (
            "negated",
            "action='continue'",
            "<tcp match='no' srcipaddr='10.0.0.1' srcipmask='8' flags='SYN,ACK/SYN' option='3'/>",
        ),
    ] {
        for direction in ["out", "in", "inout"] {
            let filter =
                format!("<filter name='f'><rule direction='{direction}' {rule}>{element}</rule></filter>");
            writeln!(out, "== {title}, {direction}\n{}", shown(&ruleset(&filter, &[]))).unwrap();
        }
    }
    assert_snapshot!(out);
}

// ---- Ethernet rules ----

#[test]
fn an_ethernet_rule_for_both_directions_has_source_and_destination_exchanged_from_the_guest() {
    let mut out = String::new();
    for element in [
        "<mac srcmacaddr='1:2:3:4:5:6' dstmacaddr='a:b:c:d:e:f' dstmacmask='ff:ff:0:0:0:0' protocolid='arp'/>",
        "<ip srcipaddr='10.0.0.1' srcipmask='24' dstipaddr='10.1.0.1' protocol='udp' srcportstart='1' dstportstart='2' dstportend='3'/>",
        "<arp arpsrcmacaddr='1:2:3:4:5:6' arpsrcipaddr='10.0.0.1' arpsrcipmask='8' arpdstipaddr='10.0.0.2' gratuitous='true'/>",
        "<ipv6 srcipaddr='fe80::1' protocol='icmpv6' type='1' typeend='4' codeend='9'/>",
        "<vlan vlanid='7' encap-protocol='arp'/>",
        "<stp type='0' root-priority='1' root-priority-hi='5' sender-address='1:2:3:4:5:6'/>",
    ] {
        let filter =
            format!("<filter name='f'><rule action='reject' direction='inout'>{element}</rule></filter>");
        writeln!(out, "== {element}\n{}", shown(&ruleset(&filter, &[]))).unwrap();
    }
    assert_snapshot!(out);
}

#[test]
fn sub_chains_and_rules_stand_in_the_order_of_their_priorities() {
    let filters = filters(&[
        "<filter name='f'>
           <rule action='accept' direction='out' priority='100'><mac protocolid='arp'/></rule>
           <filterref filter='late'/>
           <filterref filter='early'/>
           <filterref filter='tie'/>
           <rule action='drop' direction='inout' priority='1000'/>
           <rule action='accept' direction='out' priority='-700'><mac protocolid='ipv6'/></rule>
           <rule action='accept' direction='out' priority='-1000'><mac protocolid='rarp'/></rule>
         </filter>",
        "<filter name='late' chain='arp-late' priority='500'>
           <rule action='drop' direction='out' priority='9'><arp opcode='2'/></rule>
           <rule action='drop' direction='out' priority='-9'><arp opcode='1'/></rule>
         </filter>",
        "<filter name='early' chain='ipv4'><rule action='return' direction='in'><ip/></rule></filter>",
        "<filter name='tie' chain='ipv4-tie' priority='-700'><rule action='return' direction='inout'><ip/></rule></filter>",
    ]);
    assert_snapshot!(shown(&ruleset_of(&filters, "f", &[]).unwrap()));
}

// ---- variables ----

#[test]
fn a_rule_stands_for_every_combination_of_its_variables() {
    let params = [
        ("A", "10.0.0.1"),
        ("A", "10.0.0.2"),
        ("A", "10.0.0.1"),
        ("B", "10.1.0.1"),
        ("B", "10.1.0.2"),
        ("B", "10.1.0.1"),
        ("P", "80"),
        ("P", "443"),
    ];
    let mut out = String::new();
    for attributes in [
        "srcipaddr='$A'",
        "srcipaddr='$A' dstipaddr='$B'",
        "srcipaddr='$A' dstipaddr='$B[@1]'",
        "srcipaddr='$A[@1]' dstportstart='$P'",
        "srcipaddr='$A[1]' dstportstart='$P'",
        "srcipaddr='$A' dstipaddr='$A[@7]'",
    ] {
        let filter = format!(
            "<filter name='f'><rule action='drop' direction='out' statematch='0'><tcp {attributes}/></rule></filter>"
        );
        let part = ruleset(&filter, &params).ipv4.unwrap();
        writeln!(out, "== {attributes}").unwrap();
        part.from_guest.iter().for_each(|rule| writeln!(out, "{}", shown_rule(rule)).unwrap());
    }
    assert_snapshot!(out);
}

#[test]
fn what_the_outer_scope_sets_wins_over_what_an_include_passes_down() {
    let filters = filters(&[
        "<filter name='f'>
           <filterref filter='inner'><parameter name='A' value='10.0.0.1'/><parameter name='B' value='10.0.0.2'/></filterref>
           <filterref filter='inner'><parameter name='B' value='10.0.0.3'/></filterref>
         </filter>",
        "<filter name='inner'><filterref filter='leaf'><parameter name='B' value='10.0.0.4'/></filterref></filter>",
        "<filter name='leaf'><rule action='drop' direction='out'><udp srcipaddr='$A' dstipaddr='$B'/></rule></filter>",
    ]);
    let pairs = |params: &[(&str, &str)]| -> Vec<String> {
        let part = ruleset_of(&filters, "f", params).unwrap().ipv4.unwrap();
        let addresses = |rule: &Rule<IpTest>| match &rule.matches[..] {
            [_, Match { test: IpTest::SrcIp(src), .. }, Match { test: IpTest::DstIp(dst), .. }, ..] => {
                format!("{} → {}", src.addr, dst.addr)
            }
            _ => panic!("{rule:?}"),
        };
        part.from_guest.iter().map(addresses).collect()
    };
    assert_eq!(
        [pairs(&[("A", "10.9.9.9")]), pairs(&[("A", "10.9.9.9"), ("B", "10.8.8.8")])],
        [["10.9.9.9 → 10.0.0.2", "10.9.9.9 → 10.0.0.3"], ["10.9.9.9 → 10.8.8.8", "10.9.9.9 → 10.8.8.8"],]
    );
}

#[test]
fn mac_is_the_binding_s_own_unless_a_parameter_gives_it() {
    let filter = "<filter name='f'><rule action='drop' direction='out'><mac match='no' srcmacaddr='$MAC'/></rule></filter>";
    assert!(shown(&ruleset(filter, &[])).contains("addr:52:54:00:7b:35:93"));
    assert!(shown(&ruleset(filter, &[("MAC", "2:0:0:0:0:1")])).contains("addr:02:00:00:00:00:01"));
}

// ---- what is refused ----

#[test]
fn refusals_say_where_what_and_what_to_do() {
    let rule = |element: &str| {
        format!("<filter name='f'>\n  <rule action='drop' direction='out'>{element}</rule>\n</filter>")
    };
    let mut out = String::new();
    for (element, params) in [
        ("<tcp dstportstart='$PORT'/>", &[][..]),
        ("<tcp srcipaddr='$A[3]' dstipaddr='$IP'/>", &[("A", "10.0.0.1")]),
        ("<tcp dstportstart='$PORT'/>", &[("PORT", "http")]),
        ("<tcp dstportstart='$PORT'/>", &[("PORT", "22"), ("PORT", "65536")]),
        ("<ip srcipaddr='$A'/>", &[("A", "fe80::1")]),
        ("<tcp srcipaddr='$A' dstportstart='$P'/>", &[("A", "10.0.0.1"), ("A", "10.0.0.2"), ("P", "22")]),
        ("<tcp dstportstart='9' dstportend='3'/>", &[]),
        ("<tcp match='no' srcportstart='0' srcportend='65535'/>", &[]),
        ("<tcp option='0'/>", &[]),
        ("<all match='no' srcipaddr='10.0.0.1' srcipmask='0'/>", &[]),
        ("<ip match='no' protocol='udp' dstportstart='53'/>", &[]),
        ("<ipv6 type='128'/>", &[]),
        ("<ipv6 protocol='icmpv6' type='9' typeend='3'/>", &[]),
        ("<mac srcmacaddr='1:2:3:4:5:6' srcmacmask='0:0:0:0:0:0'/>", &[]),
        ("<vlan vlanid='4095'/>", &[]),
        ("<stp root-cost='9' root-cost-hi='3'/>", &[]),
    ] {
        writeln!(out, "{element}\n  {}", refusal(&rule(element), params)).unwrap();
    }
    let stp = "<filter name='f'><rule action='drop' direction='inout'><stp srcmacaddr='1:2:3:4:5:6'/></rule></filter>";
    writeln!(out, "{stp}\n  {}", refusal(stp, &[])).unwrap();
    let helper = rule("<tcp/>");
    writeln!(out, "CTRL_CT_HELPERS\n  {}", refusal(&helper, &[(CTRL_CT_HELPERS, "ftpx")])).unwrap();
    assert_snapshot!(out);
}

#[test]
fn a_circle_of_includes_and_a_filter_that_does_not_exist_are_named() {
    let circle = filters(&[
        "<filter name='f'><filterref filter='g'/></filter>",
        "<filter name='g'><filterref filter='h'/></filter>",
        "<filter name='h'><filterref filter='g'/></filter>",
    ]);
    let error = ruleset_of(&circle, "f", &[]).unwrap_err();
    assert_eq!(error.to_string(), "filter 'g' includes itself: g → h → g");
    let names = |names: Vec<FilterName>| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(includes_itself(&circle, &circle["g"]).map(names).as_deref(), Some("g h g"));
    assert_eq!(includes_itself(&circle, &circle["f"]), None);
    assert_eq!(reachable(&circle, &"h".parse().unwrap()).len(), 2);

    let missing = filters(&["<filter name='f'>\n<filterref filter='nosuch'/></filter>"]);
    let error = ruleset_of(&missing, "f", &[]).unwrap_err();
    assert_eq!(error.to_string(), "no filter is named 'nosuch', which f:2 includes");
    let error = ruleset_of(&missing, "nothing", &[]).unwrap_err();
    assert_eq!(error.to_string(), "no filter is named 'nothing'");
}

#[test]
fn lists_that_multiply_into_too_many_rules_are_refused() {
    let filter = "<filter name='f'><rule action='drop' direction='out'>
        <tcp srcipaddr='$A[@1]' dstipaddr='$A[@2]' srcportstart='$P[@3]'/></rule></filter>";
    let params: Vec<_> =
        (0..100).flat_map(|n| [("A", format!("10.0.0.{n}")), ("P", n.to_string())]).collect();
    let params: Vec<_> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert_eq!(refusal(filter, &params), "f:1: the filter expands to more than 100000 rules");
}

// ---- conntrack helpers ----

#[test]
fn control_ports_that_new_connections_may_use_get_helpers_where_related_matters() {
    let related = "<rule action='accept' direction='inout'><all state='ESTABLISHED,RELATED'/></rule>";
    let mut out = String::new();
    for (title, rules, params) in [
        (
            "a server in the guest",
            format!("{related}<rule action='accept' direction='in'><tcp dstportstart='21'/></rule>"),
            &[("IP", "10.0.0.2")][..],
        ),
        (
            "a client in the guest",
            format!(
                "{related}<rule action='accept' direction='out'><tcp dstportstart='20' dstportend='25'/></rule>"
            ),
            &[],
        ),
        (
            "nothing related",
            "<rule action='accept' direction='in'><tcp dstportstart='21'/></rule>".to_owned(),
            &[("IP", "10.0.0.2")],
        ),
        (
            "only established ones",
            format!(
                "{related}<rule action='accept' direction='in'><tcp dstportstart='21' state='ESTABLISHED'/></rule>"
            ),
            &[("IP", "10.0.0.2")],
        ),
        (
            "switched off",
            format!("{related}<rule action='accept' direction='in'><tcp dstportstart='21'/></rule>"),
            &[("IP", "10.0.0.2"), (CTRL_CT_HELPERS, "none")],
        ),
        (
            "named, on another port",
            "<rule action='accept' direction='in'><tcp dstportstart='2121'/></rule>".to_owned(),
            &[("IP", "10.0.0.2"), (CTRL_CT_HELPERS, "ftp:2121")],
        ),
        (
            "a port in a variable",
            format!("{related}<rule action='accept' direction='out'><udp dstportstart='$P'/></rule>"),
            &[("P", "69"), ("P", "5060")],
        ),
    ] {
        let ruleset = ruleset(&format!("<filter name='f'>{rules}</filter>"), params);
        writeln!(out, "{title}").unwrap();
        for helper in &ruleset.helpers {
            writeln!(out, "  {}", serde_json::to_string(helper).unwrap().replace('"', "")).unwrap();
        }
    }
    assert_snapshot!(out);
}

#[test]
fn a_negated_mask_of_zero_matches_nothing_on_frames_and_is_refused_on_packets() {
    let negated = |element: &str, address: &str| {
        format!(
            "<filter name='f'><rule action='drop' direction='out'>
               <{element} match='no' srcipaddr='{address}' srcipmask='0'/></rule></filter>"
        )
    };
    for (element, address) in [("ip", "10.0.0.2"), ("ipv6", "2001:db8::2")] {
        let ruleset = ruleset(&negated(element, address), &[]);
        assert!(shown(&ruleset).contains("prefix:0},negated:true"), "{}", shown(&ruleset));
    }
    for (element, address) in [("tcp", "10.0.0.2"), ("tcp-ipv6", "2001:db8::2")] {
        let error = refusal(&negated(element, address), &[]);
        assert!(error.starts_with("f:1: match='no' with a mask of 0 leaves no address"), "{error}");
    }
}

// ---- before a filter can apply ----

#[test]
fn provisional_rulesets_let_through_what_learning_an_address_needs() {
    let mac = "52:54:00:7b:35:93".parse().unwrap();
    let server = "10.0.0.254".parse().unwrap();
    assert_snapshot!(format!(
        "== nothing\n{}\n== learning\n{}\n== DHCP\n{}\n== DHCP from one server\n{}",
        shown(&Ruleset::drop_all()),
        shown(&Ruleset::learning(mac)),
        shown(&Ruleset::dhcp_only(mac, &[])),
        shown(&Ruleset::dhcp_only(mac, &[server])),
    ));
}
