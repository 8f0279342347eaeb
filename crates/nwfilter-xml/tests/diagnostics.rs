//! The documents under xml-fixtures that are wrong, and what is said about them.

mod common;

use common::fixtures;
use nwfilter_xml::{Diagnostics, check};

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
