//! What holds for every filter and for every text.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

#[path = "common/invariants.rs"]
mod invariants;

use nwfilter_testlab::generate::{Generator, Options};
use nwfilter_xml::{Filter, FilterName, Strictness, read_filter, read_filter_with, write_filter};
use proptest::prelude::*;

fn name() -> FilterName {
    "random".parse().unwrap()
}

fn any_filter(seed: u64, instantiable: bool) -> Filter {
    let includes = vec!["it's <other> & \"more\"".parse().unwrap(), "clean-traffic".parse().unwrap()];
    let options = Options { includes, instantiable, like_libvirt: false, ..Options::default() };
    Generator::with_options(seed, options).filter(name())
}

/// A document with bytes of it replaced, taken out or repeated.
fn damaged() -> impl Strategy<Value = String> {
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6);
    (any::<u64>(), damage).prop_map(|(seed, damage)| {
        let mut generator = Generator::new(seed);
        let filter = generator.filter(name());
        let mut bytes = generator.document(&filter).into_bytes();
        for (at, byte, how) in damage {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, b"<>'\"&=/ $[@]"[byte as usize % 12]),
                _ => bytes.extend_from_within(at..),
            }
            bytes.push(b'\n');
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_filter_is_the_same_after_it_was_written_and_read(seed: u64, instantiable: bool) {
        let filter = any_filter(seed, instantiable);
        let written = write_filter(&filter);
        let read = read_filter("written.xml", &written).into_result().map(Filter::without_places);
        prop_assert_eq!(read.map_err(|problems| problems.to_string()), Ok(filter), "{}", written);
    }

    #[test]
    fn a_filter_is_the_same_however_it_is_spelt(seed: u64, instantiable: bool) {
        let filter = any_filter(seed, instantiable);
        let spelt = Generator::new(seed).document(&filter);
        let read = read_filter_with("spelt.xml", &spelt, Strictness::AsLibvirt).into_result().map(Filter::without_places);
        prop_assert_eq!(read.map_err(|problems| problems.to_string()), Ok(filter), "{}", spelt);
    }

    #[test]
    fn a_damaged_document_is_read_as_well_as_it_can_be(text in damaged()) {
        invariants::hold(&text);
    }

    #[test]
    fn an_invalid_document_is_refused_with_an_error_inside_it(seed: u64) {
        let (text, wrong) = Generator::new(seed).invalid_document(name());
        let reading = read_filter_with("invalid.xml", &text, Strictness::AsLibvirt);
        prop_assert!(reading.value.is_none() && reading.diagnostics.has_errors(), "{wrong}:\n{text}");
        invariants::hold(&text);
    }

    #[test]
    fn no_text_makes_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        invariants::hold(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn no_value_of_an_attribute_makes_the_reader_panic(
        value in "[$\\[\\]@0-9a-fA-FxX:./,+ -]{0,40}|\\PC{0,20}",
        index in any::<prop::sample::Index>(),
    ) {
        let spec = index.get(nwfilter_xml::schema::PROTOCOLS);
        let value = value.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;");
        let attributes: String =
            spec.attributes.iter().map(|row| format!("\n {}='{value}'", row.name)).collect();
        let element = spec.element;
        let text = format!(
            "<filter name='f'><rule action='drop' direction='in'><{element}{attributes}/></rule></filter>"
        );
        invariants::hold(&text);
    }
}
