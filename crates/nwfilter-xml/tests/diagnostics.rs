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
