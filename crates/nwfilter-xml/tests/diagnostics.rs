//! The documents under xml-fixtures that are wrong, and what is said about them.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod common;

use std::collections::BTreeSet;

use common::fixtures;
use nwfilter_xml::{Code, Diagnostics, MAX_BYTES, MAX_ENTRIES, MAX_SET_ENTRIES, check, decode};

/// The diagnostics of every document in a directory, each held against its snapshot.
fn snapshots(below: &str, as_expected: impl Fn(&Diagnostics) -> bool) {
    for (name, text) in fixtures(below) {
        let diagnostics = check(&name, &text);
        assert!(as_expected(&diagnostics), "{name}:\n{diagnostics}");
        insta::assert_snapshot!(format!("{below}/{name}").replace('/', " "), diagnostics.to_string());
    }
}

#[test]
fn a_document_that_is_wrong_is_refused_with_the_place_the_reason_and_what_was_expected() {
    snapshots("invalid", Diagnostics::has_errors);
}

#[test]
fn a_document_that_says_what_has_no_effect_is_taken_with_a_warning() {
    snapshots("invalid/warnings", |diagnostics| !diagnostics.has_errors() && !diagnostics.items.is_empty());
}

#[test]
fn a_document_is_checked_as_what_its_root_element_says() {
    for (text, expected) in [
        ("<filterbinding/>", "the binding has no <owner>"),
        ("<?xml version='1.0'?><!-- <filter/> --><domain/>", "the domain has no <name>"),
        ("<filter/>", "<filter> has no attribute 'name'"),
        ("<network/>", "the document is a <network>, expected a <filter>"),
    ] {
        let diagnostics = check("d.xml", text);
        assert!(diagnostics.items.iter().any(|item| item.message == expected), "{text}: {diagnostics}");
    }
}

#[test]
fn a_filter_that_passes_a_bad_address_to_another_is_refused() {
    for (name, value) in [("IP", "10.0.0.2/24"), ("IP", ""), ("IPV6", "fe80::1%eth0")] {
        let include = format!("<filterref filter='g'><parameter name='{name}' value='{value}'/></filterref>");
        let diagnostics = check("d.xml", &format!("<filter name='f'>{include}</filter>"));
        let expected = format!("{name} is '{value}', which is no IP address");
        assert!(diagnostics.has_errors() && diagnostics.items[0].message == expected, "{diagnostics}");
    }
}

/// Codes about several documents and about files, which `nwfilterctl check` gives; its tests show them.
const OF_CHECK: [Code; 4] = [Code::NoSuchFilter, Code::IncludesItself, Code::CannotRead, Code::TooLarge];

#[test]
fn every_code_has_a_document_that_gives_it() {
    let mut given: BTreeSet<Code> = OF_CHECK.into();
    let mut add = |diagnostics: Diagnostics| given.extend(diagnostics.items.iter().map(|item| item.code));
    for (name, text) in ["invalid", "invalid/warnings"].into_iter().flat_map(fixtures) {
        add(check(&name, &text));
    }
    let many = |what: &str, count| format!("<filter name='f'>{}</filter>", what.repeat(count));
    let parameters = "<parameter name='A' value='1'/>";
    let attributes: String = (0..1000).map(|n| format!(" a{n}=''")).collect();
    for text in [
        " ".repeat(MAX_BYTES + 1),
        format!("<filter{attributes}/>"),
        many("<a/>", 1_000_000),
        many("<rule action='drop' direction='in'/>", MAX_ENTRIES + 1),
        many(&format!("<filterref filter='f'>{}</filterref>", parameters.repeat(1000)), 66),
        format!(
            "<filterset name='s' family='ipv4'>{}</filterset>",
            "<tag name='t'/>".repeat(MAX_SET_ENTRIES + 1)
        ),
    ] {
        add(check("limits.xml", &text));
    }
    add(decode("latin1.xml", b"\xe9t\xe9>").unwrap_err());
    let missing: Vec<_> = Code::ALL.iter().filter(|code| !given.contains(code)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn codes_have_consecutive_numbers() {
    for (number, code) in (1..).zip(Code::ALL) {
        assert_eq!(code.to_string(), format!("NWF{number:04}"));
    }
}
