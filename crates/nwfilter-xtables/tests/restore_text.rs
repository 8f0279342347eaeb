//! The text that the restore tools get, for the seed's filters.
#![allow(clippy::unwrap_used)] // A helper of a test fails as the test does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use nwfilter_rules::{Ruleset, instantiate};
use nwfilter_xml::{Filter, FilterName, read_binding, read_filter};
use nwfilter_xtables::restore_text;

fn filters() -> BTreeMap<FilterName, Filter> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-fixtures");
    let files = ["seed", "stock"].into_iter().flat_map(|dir| fs::read_dir(root.join(dir)).unwrap());
    let texts = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
    let filters = texts.map(|text| read_filter("filter.xml", &text).into_result().unwrap());
    filters.map(|filter| (filter.name.clone(), filter)).collect()
}

fn text_of(filter: &str) -> String {
    let binding = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'>
         <parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
    );
    let binding = read_binding("binding.xml", &binding).into_result().unwrap();
    restore_text(&binding.port, &instantiate(&filters(), &binding).unwrap())
}

#[test]
fn both_seed_filters_as_restore_text() {
    assert_snapshot!("ftp-by-port", text_of("ftp-by-port"));
    assert_snapshot!("ftp-by-state", text_of("ftp-by-state"));
}

#[test]
fn the_same_input_gives_the_same_text() {
    assert_eq!(text_of("ftp-by-state"), text_of("ftp-by-state"));
}

#[test]
fn a_port_that_waits_for_its_address_lets_through_what_learning_needs() {
    let port = "vnet0".parse().unwrap();
    let mac = "52:54:00:7b:35:93".parse().unwrap();
    assert_snapshot!("learning", restore_text(&port, &Ruleset::learning(mac)));
    assert_snapshot!("drop-all", restore_text(&port, &Ruleset::drop_all()));
}
