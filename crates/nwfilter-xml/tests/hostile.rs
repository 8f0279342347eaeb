//! Documents made to exhaust the reader.

use std::time::{Duration, Instant};

use nwfilter_xml::{
    Code, MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_ENTRIES, MAX_NAMESPACES, MAX_VALUES, METADATA_NAMESPACE,
    Reading, check, read_domain, read_filter,
};

/// What one document may cost; far more than it does, far less than an attack wants.
const PATIENCE: Duration = Duration::from_secs(20);

fn refused(text: &str) -> String {
    let start = Instant::now();
    let Reading { value, diagnostics } = read_filter("hostile.xml", text);
    assert!(value.is_none());
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let shown = diagnostics.to_string();
    assert!(shown.len() < 500_000, "{} bytes of diagnostics", shown.len());
    shown
}

fn filter(body: &str) -> String {
    format!("<filter name='hostile'>{body}</filter>")
}

#[test]
fn a_million_nested_elements_do_not_exhaust_the_stack() {
    let depth = 1_000_000;
    let nested = format!("{}{}", "<a>".repeat(depth / 2), "</a>".repeat(depth / 2));
    assert!(nested.len() < MAX_BYTES);
    let shown = refused(&filter(&nested));
    assert!(shown.contains("nested more than 257 deep"), "{shown}");
    assert!(refused(&"<a>".repeat(depth)).contains("nested more than 257 deep"));
    assert!(refused(&"<a b='>' ".repeat(depth / 3)).contains("more than 256 attributes"));
}

#[test]
fn the_deepest_nesting_allowed_is_that_of_libvirt() {
    let nested = |depth: usize| filter(&format!("{}{}", "<a>".repeat(depth - 1), "</a>".repeat(depth - 1)));
    assert!(read_filter("deep.xml", &nested(MAX_DEPTH)).value.is_some());
    assert!(read_filter("deep.xml", &nested(MAX_DEPTH + 1)).value.is_none());
}

/// As many attributes as a document can have, all of one element.
fn attributes(count: usize, name: &str) -> String {
    (0..count).map(|n| format!(" {name}{n}=''")).collect()
}

#[test]
fn attributes_of_an_element_are_limited_in_every_kind_of_document() {
    let many = attributes(300_000, "a");
    for element in ["filter", "filterbinding", "domain"] {
        for place in [format!("<{element}{many}/>"), format!("<{element}><x{many}/></{element}>")] {
            assert!(place.len() < MAX_BYTES);
            let diagnostics = check("hostile.xml", &place);
            let [only] = &diagnostics.items[..] else { panic!("{diagnostics}") };
            assert_eq!(only.code, Code::TooManyAttributes);
        }
    }
    let rule = |count| filter(&format!("<rule action='drop' direction='in'{}/>", attributes(count, "a")));
    assert!(read_filter("f.xml", &rule(MAX_ATTRIBUTES - 2)).value.is_some());
    let refused = refused(&rule(MAX_ATTRIBUTES - 1));
    assert!(
        refused.starts_with("hostile.xml:1:24: error[NWF0003]: the element has more than 256"),
        "{refused}"
    );
}

#[test]
fn namespaces_of_a_document_are_limited() {
    let declare = |count: usize| {
        (0..count).map(|n| format!("<a xmlns:n{n}='u'>")).collect::<String>() + &"</a>".repeat(count)
    };
    assert!(read_filter("f.xml", &filter(&declare(MAX_NAMESPACES))).value.is_some());
    // Each is inherited by all elements in it.
    let nested = format!("<a{}>", attributes(200, "xmlns:n"));
    let shown = refused(&filter(&nested.repeat(200)));
    assert!(shown.contains("declares more than 256 namespaces"), "{shown}");
}

#[test]
fn the_most_attributes_that_a_document_can_have_are_read() {
    let element = |name: &str| format!("<x{}/>", attributes(MAX_ATTRIBUTES, name));
    let one = element("a-rather-long-name-of-an-attribute-");
    let text = filter(&one.repeat((MAX_BYTES - 100) / one.len()));
    let start = Instant::now();
    assert!(read_filter("f.xml", &text).value.is_some());
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

#[test]
fn filters_in_the_metadata_of_a_domain_find_their_interfaces_by_address() {
    let mac = |n: usize| format!("52:54:00:00:{:02x}:{:02x}", n / 256, n % 256);
    let interfaces: String = (0..10_000)
        .map(|n| format!("<interface type='bridge'><mac address='{}'/></interface>", mac(n)))
        .collect();
    let filters: String = (0..10_000)
        .rev()
        .map(|n| format!("<n:interface mac='{}'><n:filterref filter='f{n}'/></n:interface>", mac(n)))
        .collect();
    let text = format!(
        "<domain><name>d</name><metadata><n:filterrefs xmlns:n='{METADATA_NAMESPACE}'>{filters}</n:filterrefs>\
         </metadata><devices>{interfaces}</devices></domain>"
    );
    let start = Instant::now();
    let domain = read_domain("d.xml", &text).into_result().unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    for (n, interface) in domain.interfaces.iter().enumerate() {
        let filter = interface.filter.as_ref().map(|filter| filter.filter.to_string());
        assert_eq!(filter, Some(format!("f{n}")));
    }
}

#[test]
fn tags_of_a_guest_count_for_each_of_its_interfaces() {
    let tags = |count: usize| (0..count).map(|n| format!("<n:tag name='t{n}'/>")).collect::<String>();
    let interface = "<interface type='bridge'><filterref filter='f'/></interface>".repeat(1_000);
    let text = |count| {
        format!(
            "<domain><name>d</name><metadata><n:filterrefs xmlns:n='{METADATA_NAMESPACE}'>{}</n:filterrefs>\
             </metadata><devices>{interface}</devices></domain>",
            tags(count)
        )
    };
    let domain = read_domain("d.xml", &text(60)).into_result().unwrap_or_else(|wrong| panic!("{wrong}"));
    let of_last = domain.interfaces.last().and_then(|interface| interface.filter.clone());
    assert_eq!(of_last.and_then(|filter| Some(filter.params.get("CTRL_TAGS")?.len())), Some(60));
    let start = Instant::now();
    let refused = read_domain("d.xml", &text(20_000)).into_result().map(drop);
    let shown = refused.map_err(|wrong| wrong.to_string());
    assert!(shown.is_err_and(|shown| shown.contains("more than 65536 values and tags are passed")));
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

#[test]
fn a_document_that_is_too_long_is_not_parsed() {
    let shown = refused(&" ".repeat(MAX_BYTES + 1));
    assert!(shown.contains("the document has 4194305 bytes; at most 4194304 are read"), "{shown}");
}

#[test]
fn entities_are_neither_expanded_nor_fetched() {
    let billion = "<!DOCTYPE filter [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;'>]>";
    let outside = "<!DOCTYPE filter [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>";
    for doctype in [billion, outside, "<!DOCTYPE filter []>"] {
        let shown = refused(&format!("{doctype}{}", filter("")));
        assert!(shown.contains("a document type with declarations is not read"), "{shown}");
    }
    for doctype in ["<!DOCTYPE filter>", "<!DOCTYPE filter SYSTEM 'http://example.org/'>"] {
        assert!(read_filter("typed.xml", &format!("{doctype}{}", filter(""))).value.is_some(), "{doctype}");
        let shown = refused(&format!("{doctype}{}", filter("&a;")));
        assert!(shown.contains("malformed XML"), "{shown}");
    }
}

#[test]
fn rules_and_values_are_limited() {
    let rule = "<rule action='drop' direction='in'/>";
    let shown = refused(&filter(&rule.repeat(MAX_ENTRIES + 1)));
    assert!(shown.contains("more than 65536 rules and includes"), "{shown}");
    assert!(read_filter("many.xml", &filter(&rule.repeat(MAX_ENTRIES))).value.is_some());
    let value = "<parameter name='A' value='1'/>";
    let shown =
        refused(&filter(&format!("<filterref filter='f'>{}</filterref>", value.repeat(MAX_VALUES + 1))));
    assert!(shown.contains("more than 65536 values"), "{shown}");
}

#[test]
fn a_document_of_nothing_but_mistakes_shows_some_and_counts_the_rest() {
    let shown = refused(&filter(&"<rule action='x' odd=''/>".repeat(10_000)));
    assert!(shown.contains("<rule> has no attribute 'direction'"));
    assert!(
        shown.ends_with("hostile.xml: 29600 more problems are not shown"),
        "{}",
        &shown[shown.len() - 99..]
    );
}

#[test]
fn a_megabyte_on_one_line_is_read_as_fast_as_on_many() {
    let rule = "<rule action='drop' direction='in'><tcp dstportstart='80' srcipaddr='10.0.0.1'/></rule>";
    let start = Instant::now();
    assert!(read_filter("one-line.xml", &filter(&rule.repeat(20_000))).value.is_some());
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

#[test]
fn a_long_value_is_read_in_linear_time() {
    let long = "7".repeat(MAX_BYTES / 16);
    let spaces = " ".repeat(MAX_BYTES / 16);
    for row in nwfilter_xml::Protocol::Tcp.spec().attributes {
        let name = row.name;
        let rule = |more: &str| {
            filter(&format!("<rule action='drop' direction='in'><tcp {more}{name}='{long}'/></rule>"))
        };
        let start = Instant::now();
        read_filter("long.xml", &rule("")).diagnostics.to_string();
        check("long.xml", &rule(&format!("{spaces}odd='{spaces}'\n{spaces}"))).to_string();
        assert!(start.elapsed() < PATIENCE, "{name}: {:?}", start.elapsed());
    }
}
