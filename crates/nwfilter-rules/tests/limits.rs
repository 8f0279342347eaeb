//! Trees that expand to more than a port can have are refused before much time has passed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nwfilter_rules::{MAX_EXPANSION, RulesError, Ruleset, instantiate, reachable};
use nwfilter_xml::{Binding, Filter, FilterName, read_binding, read_filter};

/// Far more than the 100 ms that docs/language.md names, because other tests run at the same time. Without limits most of
/// these trees take hours.
const SOON: Duration = Duration::from_secs(10);

type Filters = BTreeMap<FilterName, Filter>;

/// Filters from the contents of their documents: `f0`, `f1` and so on.
fn filters(contents: impl IntoIterator<Item = String>) -> Filters {
    let document = |(n, content): (usize, String)| format!("<filter name='f{n}'>{content}</filter>");
    let documents = contents.into_iter().enumerate().map(document);
    let read = documents.map(|text| read_filter("f.xml", &text).into_result().unwrap());
    read.map(|filter| (filter.name.clone(), filter)).collect()
}

/// Filters of which each includes the next twice, and what the last one has.
fn doubled(count: usize, last: &str) -> Filters {
    let twice = |next: usize| format!("<filterref filter='f{next}'/>").repeat(2);
    filters((1..count).map(twice).chain([last.to_owned()]))
}

fn binding(params: &str) -> Binding {
    let text = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f0'>{params}</filterref>
         </filterbinding>"
    );
    read_binding("binding.xml", &text).into_result().unwrap()
}

fn parameters(names: impl Iterator<Item = impl std::fmt::Display>) -> String {
    names.map(|name| format!("<parameter name='{name}' value='1'/>")).collect()
}

/// The outcome, which comes soon.
fn soon(filters: &Filters, binding: &Binding) -> Result<Ruleset, RulesError> {
    let begin = Instant::now();
    let outcome = instantiate(filters, binding);
    let took = begin.elapsed();
    assert!(took < SOON, "{took:?}");
    outcome
}

#[test]
fn filters_without_rules_are_followed_once_however_often_they_are_included() {
    let filters = doubled(41, "");
    let binding = binding("");
    let empty = Ruleset { guest_mac: Some(binding.mac), ..Ruleset::default() };
    assert_eq!(soon(&filters, &binding), Ok(empty));
    assert_eq!(reachable(&filters, &"f0".parse().unwrap()).len(), 41);
}

#[test]
fn filters_whose_includes_double_their_rules_are_refused_with_the_innermost_that_has_too_many() {
    let refused = soon(&doubled(41, "<rule action='drop' direction='in'/>"), &binding("")).unwrap_err();
    // 16 levels have 2^16 includes of the filter with the rule, and as many again on the way to it.
    let message = format!("filter 'f24' expands to more than {MAX_EXPANSION} includes");
    assert_eq!(refused.to_string(), message);
    let rules = "<rule action='drop' direction='in'/>".repeat(1000);
    let refused = soon(&doubled(41, &rules), &binding("")).unwrap_err();
    assert_eq!(refused, RulesError::TooLarge { filter: "f33".parse().unwrap(), limit: MAX_EXPANSION });
}

#[test]
fn a_missing_filter_and_a_circle_at_the_end_of_a_doubled_tree_are_found_at_once() {
    let refused = soon(&doubled(41, "<filterref filter='gone'/>"), &binding("")).unwrap_err();
    assert_eq!(refused.to_string(), "no filter is named 'gone', which f40:1 includes");
    let refused = soon(&doubled(41, "<filterref filter='f39'/>"), &binding("")).unwrap_err();
    assert_eq!(refused.to_string(), "filter 'f39' includes itself: f39 → f40 → f39");
}

#[test]
fn a_chain_of_includes_that_is_longer_than_a_stack_is_deep_is_expanded() {
    let next = |n: usize| format!("<filterref filter='f{n}'/>");
    let filters = filters((1..50_000).map(next).chain(["<rule action='drop' direction='in'/>".to_owned()]));
    let ruleset = instantiate(&filters, &binding("")).unwrap();
    assert_eq!(ruleset.ethernet.to_guest.unwrap().root.len(), 1);
}

#[test]
fn lists_that_multiply_are_refused_before_they_are_multiplied() {
    // All values are the same: repeated combinations make one rule, but to find them takes time.
    let binding =
        binding(&parameters(["A", "B"].into_iter().flat_map(|list| std::iter::repeat_n(list, 30_000))));
    let rule = |attributes| format!("<rule action='drop' direction='in'><tcp {attributes}/></rule>");
    for filters in [
        filters([rule("dstportstart='$A'").repeat(4)]),
        filters([rule("srcportstart='$A' dstportstart='$B[@1]'")]),
        doubled(5, &rule("dstportstart='$A'")),
    ] {
        let refused = soon(&filters, &binding).unwrap_err();
        assert!(matches!(refused, RulesError::TooManyRules { limit: MAX_EXPANSION, .. }), "{refused}");
    }
}

#[test]
fn includes_that_each_copy_many_variables_are_refused() {
    let include = "<filterref filter='f1'><parameter name='own' value='1'/></filterref>".repeat(10_000);
    let filters = filters([include, "<rule action='drop' direction='in'/>".to_owned()]);
    let refused = soon(&filters, &binding(&parameters((0..50_000).map(|n| format!("V{n}"))))).unwrap_err();
    assert!(matches!(refused, RulesError::PassesTooMuch { .. }), "{refused}");
    // A list counts once.
    let list = binding(&parameters(std::iter::repeat_n("V", 50_000)));
    assert_eq!(instantiate(&filters, &list).unwrap().ethernet.to_guest.unwrap().root.len(), 10_000);
}

#[test]
fn what_is_wrong_with_the_last_of_all_rules_that_a_port_can_have_is_found_soon() {
    let rule =
        |port: &str| format!("<rule action='accept' direction='inout'><tcp dstportstart='{port}'/></rule>");
    let many = (0..20).map(|_| "<filterref filter='f1'/>").collect::<String>() + &rule("$BAD");
    let filters = filters([many, rule("80").repeat(MAX_EXPANSION / 20 - 1)]);
    let bad = binding("<parameter name='BAD' value='word'/>");
    assert!(matches!(soon(&filters, &bad), Err(RulesError::BadValue { .. })));
    assert!(matches!(soon(&filters, &binding("")), Err(RulesError::MissingVariables { .. })));
}

#[test]
fn the_limit_is_documented() {
    let page =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/language.md")).unwrap();
    let thousands = MAX_EXPANSION / 1000;
    assert!(page.contains(&format!("more than {thousands},000 rules")));
}
