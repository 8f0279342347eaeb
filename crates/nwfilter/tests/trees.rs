//! Trees of filters that expand without end are refused, and other ports are bound meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use std::sync::Barrier;
use std::thread;

use driver_support::{Lab, accepting, binding, define};
use nwfilter::rules::RulesError;
use nwfilter::{Driver, Error, Fake};
use nwfilter_testlab::{Need, filter_name, skip_unless};

/// How many filters each include the next twice: to follow these includes one by one would take days.
const FILTERS: usize = 41;

fn define_doubled(driver: &Driver, last: &str) {
    let next = |n: usize| format!("<filterref filter='f{}'/>", n + 1).repeat(2);
    let content = |n: usize| if n + 1 < FILTERS { next(n) } else { last.to_owned() };
    let filters = (0..FILTERS).map(|n| format!("<filter name='f{n}'>{}</filter>", content(n)));
    define(driver, &filters.collect::<Vec<_>>()).unwrap();
}

#[test]
fn a_tree_without_end_is_refused_and_the_bindings_of_other_ports_go_on_meanwhile() {
    skip_unless!(Need::Root);
    let lab = Lab::new(2);
    let driver = lab.fake_driver(&Fake::new());
    define_doubled(&driver, "<rule action='drop' direction='in'/>");
    define(&driver, &[accepting("web", 80)]).unwrap();
    let both_begin = Barrier::new(2);
    let bind = |port, filter| {
        both_begin.wait();
        lab.host.enter(|| driver.create_binding(binding(port, filter)))
    };
    let (refused, bound) = thread::scope(|scope| {
        let refused = scope.spawn(|| bind("p0", "f0"));
        let bound = scope.spawn(|| bind("p1", "web"));
        (refused.join().unwrap(), bound.join().unwrap())
    });
    let Err(Error::Rules { source, .. }) = refused else { panic!("{refused:?}") };
    assert!(matches!(*source, RulesError::TooManyIncludes { .. }), "{source}");
    bound.unwrap();
    let bindings = driver.bindings().unwrap();
    assert_eq!(driver_support::names(bindings.iter().map(|binding| &binding.port)), ["p1"]);
}

#[test]
fn a_port_is_bound_to_a_tree_without_rules_however_often_its_filters_are_included() {
    skip_unless!(Need::Root);
    let lab = Lab::new(1);
    let driver = lab.fake_driver(&Fake::new());
    define_doubled(&driver, "");
    lab.host.enter(|| driver.create_binding(binding("p0", "f0"))).unwrap();
    let used = driver.undefine_filter(&filter_name("f40")).unwrap_err();
    assert!(matches!(used, Error::FilterInUse { .. }), "{used}");
}
