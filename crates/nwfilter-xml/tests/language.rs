//! The reference page of the language: docs/language.md is what this writes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;

use nwfilter_xml::schema::{Attribute, PROTOCOLS, ProtocolSpec};
use nwfilter_xml::{
    ChainKind, Code, Kind, Layer, MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_ENTRIES, MAX_NAMESPACES,
    MAX_VALUES, METADATA_NAMESPACE,
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/language.md");

#[test]
fn the_reference_page_is_current() {
    let page = page();
    if std::env::var_os("NWFILTER_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(PAGE, &page).unwrap();
    }
    let checked_in = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(checked_in == page, "docs/language.md is out of date: run this test with NWFILTER_BLESS=1");
}

#[test]
fn the_page_of_diagnostics_is_current() {
    let mut page = String::from(DIAGNOSTICS);
    for code in Code::ALL {
        line(&mut page, format_args!("\n## {code}: {}\n\n{}", code.title(), code.explanation()));
    }
    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/diagnostics.md");
    if std::env::var_os("NWFILTER_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(PAGE, &page).unwrap();
    }
    let checked_in = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(checked_in == page, "docs/diagnostics.md is out of date: run this test with NWFILTER_BLESS=1");
}

const DIAGNOSTICS: &str = "# Diagnostics

Every error and warning about a document has a code, as in `web.xml:3:5: error[NWF0021]: …`. A document with an error is
refused; one with warnings is taken. A code never changes its meaning. `nwfilterctl check --json` gives code, place,
message and advice for programs.

This page is written from the table in crates/nwfilter-xml/src/code.rs.
";

fn page() -> String {
    let mut chains = String::from("| chain | priority | frames |\n| --- | --- | --- |\n");
    for (kind, prefix, priority) in ChainKind::TABLE {
        let name = if kind == ChainKind::Root { "`root`".to_owned() } else { format!("`{prefix}…`") };
        let frames = match kind {
            ChainKind::Root => "all; it is entered first",
            ChainKind::Mac => "all",
            ChainKind::Vlan => "with a VLAN tag",
            ChainKind::Stp => "to the address of the spanning-tree protocol",
            ChainKind::Arp => "ARP",
            ChainKind::Rarp => "reverse ARP",
            ChainKind::Ipv4 => "IPv4",
            ChainKind::Ipv6 => "IPv6",
        };
        line(&mut chains, format_args!("| {name} | {priority} | {frames} |"));
    }
    INTRODUCTION
        .replace("{chains}", chains.trim_end())
        .replace("{kinds}", kinds().trim_end())
        .replace("{elements}", elements().trim_end())
        .replace("{namespace}", METADATA_NAMESPACE)
        .replace("{bytes}", &(MAX_BYTES >> 20).to_string())
        .replace("{depth}", &MAX_DEPTH.to_string())
        .replace("{attributes}", &MAX_ATTRIBUTES.to_string())
        .replace("{namespaces}", &MAX_NAMESPACES.to_string())
        .replace("{entries}", &MAX_ENTRIES.to_string())
        .replace("{values}", &MAX_VALUES.to_string())
}

fn line(out: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{content}");
}

/// The kinds of values, in the order in which the elements use them.
fn kinds() -> String {
    let mut kinds: Vec<Kind> = Vec::new();
    for attribute in PROTOCOLS.iter().flat_map(|spec| spec.attributes) {
        if !kinds.contains(&attribute.kind) {
            kinds.push(attribute.kind);
        }
    }
    let mut out = String::from("| value | what is read |\n| --- | --- |\n");
    for kind in kinds {
        let hex = matches!(kind, Kind::EtherType | Kind::VlanEncap);
        let number = |number: u16| if hex { format!("{number:#06x}") } else { number.to_string() };
        let named = kind.names().iter().map(|(value, name)| format!("{name} = {}", number(*value)));
        let names: Vec<_> = named.collect();
        let names = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
        line(&mut out, format_args!("| {} | {}{names} |", name_of(kind), kind.expected()));
    }
    out
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Mac => "MAC address",
        Kind::MacMask => "MAC mask",
        Kind::Ipv4 => "IPv4 address",
        Kind::Ipv4Prefix => "IPv4 mask",
        Kind::Ipv6 => "IPv6 address",
        Kind::Ipv6Prefix => "IPv6 mask",
        Kind::U8 => "8-bit number",
        Kind::U16 => "16-bit number",
        Kind::U16Decimal => "decimal number",
        Kind::U32 => "32-bit number",
        Kind::EtherType => "Ethernet protocol",
        Kind::VlanEncap => "encapsulated protocol",
        Kind::VlanId => "VLAN",
        Kind::ArpOpcode => "ARP operation",
        Kind::IpProtocol => "IP protocol",
        Kind::Dscp => "DSCP",
        Kind::Bool => "truth value",
        Kind::States => "states",
        Kind::TcpFlags => "TCP flags",
        Kind::IpSet => "ipset",
        Kind::IpSetFlags => "ipset flags",
        Kind::Comment => "comment",
    }
}

/// The elements, those with the same attributes together.
fn elements() -> String {
    let mut out = String::new();
    for (layer, title, about) in [
        (Layer::Ethernet, "Ethernet", "Frames of any kind, in the chain of the filter."),
        (
            Layer::Ipv4,
            "IPv4",
            "IPv4 packets, with the state of their connection, whatever the chain of the filter.",
        ),
        (Layer::Ipv6, "IPv6", "The same for IPv6 packets."),
    ] {
        line(&mut out, format_args!("### {title}\n\n{about}\n"));
        let specs: Vec<&ProtocolSpec> = PROTOCOLS.iter().filter(|spec| spec.layer == layer).collect();
        let same = |a: &ProtocolSpec, b: &ProtocolSpec| a.attributes == b.attributes;
        for (index, spec) in specs.iter().enumerate() {
            if specs[..index].iter().any(|earlier| same(earlier, spec)) {
                continue;
            }
            let names: Vec<_> = specs
                .iter()
                .filter(|other| same(other, spec))
                .map(|other| format!("`<{}>`", other.element))
                .collect();
            line(&mut out, format_args!("#### {}\n", names.join(", ")));
            line(&mut out, format_args!("| attribute | value | what it matches | negated with | needs |"));
            line(&mut out, format_args!("| --- | --- | --- | --- | --- |"));
            for attribute in spec.attributes {
                line(&mut out, format_args!("{}", row(spec, attribute)));
            }
            out.push('\n');
        }
    }
    out
}

fn row(spec: &ProtocolSpec, attribute: &Attribute) -> String {
    let Attribute { name, field, kind, sign_of, needs } = attribute;
    let other = |field| spec.protocol.attribute(field).map_or(String::new(), |a| format!("`{}`", a.name));
    let sign = sign_of.map(other).unwrap_or_default();
    let needs = needs.map(other).unwrap_or_default();
    format!("| `{name}` | {} | {} | {sign} | {needs} |", name_of(*kind), field.about())
}

const INTRODUCTION: &str = r#"<!-- Written by crates/nwfilter-xml/tests/language.rs out of the attribute table; change it there. -->

# The filter language

What `nwfilterctl` and the crate `nwfilter-xml` read and write: the filters of libvirt, with the same meaning. What
libvirt refuses is an **error**. What libvirt takes but ignores, replaces, or can hardly have been meant is a
**warning**, and `nwfilterctl check --strict` refuses it. [The differences from libvirt](#differences-from-libvirt) are
few.

## Filters

```xml
<filter name='web-server' chain='root'>
  <uuid>5c6d49af-b071-6127-b4ec-6f8ed4b55335</uuid>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in' priority='500'>
    <tcp dstipaddr='$IP' dstportstart='80' dstportend='90'/>
  </rule>
</filter>
```

| element | attribute | value | without it |
| --- | --- | --- | --- |
| `<filter>` | `name` | what can be the name of a file: no `/`, no control characters, 1 to 251 bytes | refused |
| | `chain` | `root`, or up to 12 of `[a-zA-Z0-9_.:-]` that start with a prefix of the table below | `root` |
| | `priority` | -1000 to 1000: when the chain is entered; ignored without a `chain` | that of the table below |
| `<uuid>` | | 32 hex digits, in which `-` and blanks have no meaning | a new one |
| `<filterref>` | `filter` | the name of a filter, whose rules are included here | refused |
| `<parameter>` | `name` | letters, digits and `_` | ignored |
| | `value` | one or more letters, digits and `_ . :`; that of `IP` and `IPV6` an IP address, else it is refused | ignored |
| `<rule>` | `action` | `drop`, `reject`, `accept`, `return` or `continue` | refused |
| | `direction` | `in` (to the guest), `out` (from it) or `inout` | refused |
| | `priority` | -1000 to 1000; anything else counts as 500 | 500 |
| | `statematch` | `0` or `false`: IP rules do not match on the state of connections by themselves | they do |

A `<parameter>` given again adds a value to the list of the first. A rule has one protocol element, or several of the
same protocol, whose attributes count together; elements of another protocol than the first are ignored. Without one it
matches every frame.

{chains}

## Attributes of protocol elements

`match='no'` on a protocol element negates its attributes. Some are negated with another attribute, wherever they stand
themselves: the tables below name it. A part, as the end of a range or a mask, has no effect without the attribute that
it needs.

Every value can be a variable: `$NAME` goes through the values of the variable, `$NAME[3]` is the fourth of them, and
`$NAME[@2]` goes through them with iterator 2 (0 to 1000; `$NAME` is iterator 0). Variables of the same iterator advance
together; different iterators are combined.

{kinds}

Numbers are written in the base in which they were read. Names, states and flags are read in any case.

`srcipfrom` and `dstipfrom` have no effect beside `srcipaddr` and `dstipaddr`. `state` has none beside `connlimit-above`
or with `statematch='false'`. An `ipset` without `ipsetflags` means `src`, except in
`<all>` and `<all-ipv6>`, where it means nothing. Ports in `<ip>` and `<ipv6>` need a `protocol` of tcp, udp, 33 (DCCP) or sctp.

An `ipset` that is the name of a set of the store is that set ([sets.md](sets.md)); any other is an ipset of the host, which the
backend nftables refuses.

## Protocol elements

{elements}

## Bindings

```xml
<filterbinding>
  <owner>
    <name>guest</name>
    <uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid>
  </owner>
  <portdev name='vnet0'/>
  <linkdev name='eth0'/>
  <mac address='52:54:00:7b:35:93'/>
  <filterref filter='clean-traffic'>
    <parameter name='IP' value='10.0.0.1'/>
  </filterref>
</filterbinding>
```

All but `<linkdev>` and the parameters must be there. A port has 1 to 15 of `[a-zA-Z0-9_.@=-]` and starts with neither
`-` nor `.`. A binding is read with libvirt's `<filterbindingstatus>` around it as well.

## Domains

Of a `<domain>` the name, the UUID and the interfaces are read: their type, target, MAC address, source and
`<filterref>`. Where libvirt has no nwfilter driver it refuses `<filterref>`; there the metadata of the domain takes its
place, with the MAC address to tell which interface is meant:

```xml
<metadata>
  <nwf:filterrefs xmlns:nwf='{namespace}'>
    <nwf:interface mac='52:54:00:7b:35:93'>
      <nwf:filterref filter='clean-traffic'>
        <nwf:parameter name='IP' value='10.0.0.1'/>
      </nwf:filterref>
    </nwf:interface>
    <nwf:tag name='web'/>
  </nwf:filterrefs>
</metadata>
```

A `<tag>` there gives all filtered interfaces of the guest a tag, by which sets find them (docs/sets.md); within `<interface>` it gives one to that
interface, also where the filter is its own `<filterref>`. Tags are added to the parameter `CTRL_TAGS` of the binding.

## Limits

A document has at most {bytes} MiB, as in libvirt's protocol, elements nested at most {depth} deep, as in libxml2, at
most {attributes} attributes of an element, at most {namespaces} declarations of namespaces, at most {entries} rules and includes, and at most {values}
values of parameters. The time to read attributes is quadratic in their number on one element, so without that limit a
document of this size could take minutes.

Filters that include others, and lists of values, multiply. A port whose filter expands to more than 100,000 rules, or to
more than 100,000 includes, or whose includes pass more than 100,000 parameters on, is refused; that takes less than
100 ms. A filter without rules is followed once, however often it is included.

## What libvirt ignores

libvirt ignores elements and attributes that it does not know. In a rule that is dangerous: a rule whose protocol or
condition is misspelt matches more than is written, and `accept` then opens the port. nwfilter refuses a document with

* an element in a rule that is no protocol (`<tpc dstportstart='80'/>`, NWF0021),
* an attribute that the protocol does not have (`<tcp dstportstrt='80'/>`), or an element in the protocol (NWF0022).

`nwfilterctl define --as-libvirt` and `check --as-libvirt`, and the library with `Strictness::AsLibvirt`, take it with a
warning. So does the libvirt module, which logs an error, unless libvirt is asked to validate the document. Filters in
libvirt's own store are read as libvirt reads them.

Unknown attributes of `<rule>` itself and unknown elements elsewhere do not make a rule match more. They are ignored with
a warning, as is everything in a foreign XML namespace. docs/diagnostics.md lists all errors and warnings.

## Differences from libvirt

Seen with libvirt 9.0.0.

| what | libvirt | here |
| --- | --- | --- |
| `dstipto` in IPv6 elements | is read as an IPv4 address | is read as an IPv6 address |
| IPv6 addresses with a zone (`fe80::1%eth0`) | are read where the host has that interface | are refused |
| an element in a rule that is no protocol, or an attribute that a protocol does not have | is ignored: the rule matches more | is refused, except in the libvirt module |
| more than 256 attributes of an element, or 256 declarations of namespaces | are read | are refused |
| a document in UTF-16 or Latin-1 | is read | is refused, with how to convert it |
| a document type with declarations (`<!DOCTYPE … [ … ]>`) | is read, and entities are expanded | is refused |
| a namespace prefix that is not declared | is taken | is refused |
| `<filterref filter=…>` with what cannot be the name of a filter | is taken, and fails when a port is bound | is refused |
| in `<ip>` and `<ipv6>`, a `protocol` that is a variable replaces one that has ports | ports are taken, in a form that libvirt cannot read again | ports are refused |
| names of ports that cannot be named in a rule | are taken | are refused |
| `ipset` with `ipsetflags` outside `<all>` and `<all-ipv6>`; libvirt writes an `ipset` without flags that way itself | both are dropped: the rule matches more than it says | both are kept |
| a chain's `priority` of 0 where 0 is not the default | is not written, and so forgotten at the next start | is written |
| the name in `<filterref>` with `&`, `<` or quotes | is written as it is, and cannot be read again | is written escaped |
| tab, newline and carriage return in a comment | are written as they are, and are blanks when read again | are written escaped |
| a comment that is cut at 256 bytes within a character | is written as broken UTF-8, and cannot be read again | is cut before the character |
| a comment, and a `dscp` in a later element of the rule | an arbitrary number takes the comment's place | the comment is kept |
"#;
