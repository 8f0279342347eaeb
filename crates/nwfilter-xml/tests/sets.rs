//! `<filterset>` documents: what is read is written, and limits hold.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod common;

use std::time::{Duration, Instant};

use common::fixtures;
use nwfilter_xml::{FilterSet, MAX_SET_BYTES, MAX_SET_ENTRIES, SetFamily, SetRange, read_set, write_set};
use proptest::prelude::*;

#[test]
fn a_set_in_canonical_form_is_written_as_it_was_read() {
    let documents = fixtures("sets");
    assert!(!documents.is_empty());
    for (name, text) in documents {
        let set = read_set(&name, &text).into_result().unwrap();
        assert_eq!(write_set(&set), text, "{name}");
    }
}

#[test]
fn an_entry_that_is_written_twice_is_read_once_and_ranges_keep_their_order() {
    let text = "<filterset name='s' family='ipv4'><entry value='10.0.0.9'/><entry value='10.0.0.0/24'/>\
                <entry value='10.0.0.0-10.0.0.255' comment='again'/></filterset>";
    let set = read_set("s.xml", text).into_result().unwrap();
    let shown: Vec<_> = set.entries.iter().map(|entry| entry.range.to_string()).collect();
    assert_eq!(shown, ["10.0.0.9", "10.0.0.0/24"]);
}

#[test]
fn a_set_of_the_most_entries_is_read_and_one_more_is_refused() {
    let text = |count: usize| {
        let entries: String = (0..count as u32)
            .map(|n| format!("  <entry value='{}'/>\n", std::net::Ipv4Addr::from(n)))
            .collect();
        format!("<filterset name='s' family='ipv4'>\n{entries}</filterset>\n")
    };
    let most = read_set("s.xml", &text(MAX_SET_ENTRIES)).into_result().unwrap();
    assert_eq!(most.entries.len(), MAX_SET_ENTRIES);
    let refused = read_set("s.xml", &text(MAX_SET_ENTRIES + 1)).into_result().unwrap_err().to_string();
    assert!(refused.contains("a set has at most 262144 entries"), "{refused}");
}

#[test]
fn ten_million_entries_are_refused_before_they_are_read() {
    let entry = "<entry value='10.0.0.1'/>";
    let text = format!("<filterset name='s' family='ipv4'>{}</filterset>", entry.repeat(10_000_000));
    assert!(text.len() > MAX_SET_BYTES);
    let begin = Instant::now();
    let refused = read_set("s.xml", &text).into_result().unwrap_err().to_string();
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(refused.contains("at most 67108864 are read"), "{refused}");
}

fn families() -> impl Strategy<Value = SetFamily> {
    prop::sample::select(SetFamily::NAMES.map(|(family, _)| family).to_vec())
}

proptest! {
    #[test]
    fn any_range_is_read_back_as_it_was_written(family in families(), a: u128, b: u128, width in 0u32..128) {
        let first = a & family.highest();
        // Half of them near each other, as networks are.
        let last = if family == SetFamily::Mac { first } else { (first | (b & (u128::MAX >> (127 - width)))) & family.highest() };
        let range = SetRange::new(family, first, last).unwrap();
        prop_assert_eq!(SetRange::parse(family, &range.to_string()).unwrap(), range);
    }

    #[test]
    fn any_text_is_an_entry_or_refused_with_what_was_expected(family in families(), text in "[0-9a-f.:/-]{0,24}|\\PC{0,12}") {
        match SetRange::parse(family, &text) {
            Ok(range) => prop_assert_eq!(SetRange::parse(family, &range.to_string()).unwrap(), range),
            Err(why) => prop_assert!(!why.to_string().is_empty()),
        }
    }

    #[test]
    fn any_lines_are_entries_or_refused_with_their_line(text in "([0-9./ #a-z]{0,20}\n){0,5}") {
        if let Err(why) = FilterSet::read_entries(SetFamily::Ipv4, "t", &text) {
            prop_assert!(why.to_string().starts_with("t:"), "{}", why);
        }
    }
}
