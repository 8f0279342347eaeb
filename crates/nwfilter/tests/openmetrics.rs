//! The metrics as text: as OpenMetrics 1.0 wants it, and with every name that the dashboard and the manual use.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use nwfilter::rules::Count;
use nwfilter::xml::read_binding;
use nwfilter::{Config, Driver, Fake, Host};
use serde_json::Value;

/// A driver that did a bit of everything, without a kernel.
fn metrics() -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::new(dir.path().join("etc"), dir.path().join("run"));
    config.host = Host::fake();
    let fake = Fake::new();
    let driver = Driver::builder().config(config).without_learner().open(fake.clone()).unwrap();
    for (name, rule) in [("plain", "<all/>"), ("learning", "<ip srcipaddr='$IP'/>")] {
        let filter =
            format!("<filter name='{name}'><rule action='accept' direction='out'>{rule}</rule></filter>");
        driver.define_filter(name, &filter).unwrap();
    }
    for (port, filter) in [("p0", "plain"), ("p1", "learning"), ("p2", "none"), ("p3", "plain")] {
        fake.refuse(&"p3".parse().unwrap(), port == "p3");
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
             <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'/></filterbinding>"
        );
        let done = driver.create_binding(read_binding(port, &binding).into_result().unwrap());
        assert_eq!(done.is_ok(), ["p0", "p1"].contains(&port), "{port}: {done:?}");
    }
    let (port, dropping) = (
        "p4".parse().unwrap(),
        "<filter name='drop'><rule action='drop' direction='out'><all/></rule></filter>",
    );
    let filter = driver.define_filter("drop", dropping).unwrap().0;
    let binding = "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='p4'/><mac address='52:54:00:7b:35:93'/><filterref filter='drop'>\
         <parameter name='CTRL_LOG_DROPS' value='yes'/></filterref></filterbinding>";
    driver.create_binding(read_binding("p4", binding).into_result().unwrap()).unwrap();
    let ruleset = fake.ruleset(&port).unwrap();
    let origin = ruleset.rules().find(|rule| rule.verdict().stops()).unwrap().origin().clone();
    assert_eq!(origin.filter.as_deref(), Some(&filter.name));
    fake.set_count(&port, &origin, Count { packets: 7, bytes: 700 });
    driver.openmetrics().unwrap()
}

/// A kind of numbers.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    has_help: bool,
    /// By name and labels, as they are written.
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Family {
    /// The names that samples of a family may have.
    fn names(name: &str, kind: &str) -> Vec<String> {
        let endings: &[&str] = match kind {
            "gauge" => &[""],
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{other} is not a kind that is used here"),
        };
        endings.iter().map(|ending| format!("{name}{ending}")).collect()
    }
}

/// Reads the text, and refuses whatever the standard does not allow.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let text = text.strip_suffix("# EOF\n").expect("the end");
    assert!(!text.contains("# EOF") && !text.contains("\n\n") && !text.contains('\r'));
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(line) = line.strip_prefix("# ") {
            let [keyword, name, rest] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.starts_with("nwfilter_") && name.chars().all(is_name), "{line}");
            if keyword == "TYPE" {
                assert!(!families.contains_key(name), "the samples of a family are together: {line}");
                families.insert(name.to_owned(), Family { kind: rest.to_owned(), ..Family::default() });
                current = name.to_owned();
                continue;
            }
            let family = families.get_mut(name).expect("a type before the help");
            assert!(keyword == "HELP" && name == current && family.samples.is_empty(), "{line}");
            assert!(rest.ends_with('.') && !family.has_help, "{line}");
            family.has_help = true;
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().unwrap();
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => {
                (name, self::labels(labels.strip_suffix('}').expect("the end of labels")))
            }
            None => (series, BTreeMap::new()),
        };
        let family = families.get_mut(&current).expect("a type before samples");
        assert!(Family::names(&current, &family.kind).contains(&name.to_owned()), "{line}");
        assert!(value.is_finite() && value >= 0.0, "{line}");
        assert!(
            !family.samples.iter().any(|(known, of, _)| (known.as_str(), of) == (name, &labels)),
            "{line}"
        );
        family.samples.push((name.to_owned(), labels, value));
    }
    for (name, family) in &families {
        assert!(family.has_help, "{name}");
        if family.kind == "histogram" {
            check_histogram(name, family);
        }
    }
    families
}

fn labels(text: &str) -> BTreeMap<String, String> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').expect("a value of a label");
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).expect("quotes");
        assert!(!value.contains('"') && !name.is_empty(), "{pair}");
        (name.to_owned(), value.to_owned())
    };
    text.split(',').map(pair).collect()
}

/// Buckets are cumulative, in ascending order, and the last one holds all.
fn check_histogram(name: &str, family: &Family) {
    let of = |ending: &'static str| {
        family.samples.iter().filter(move |(found, ..)| *found == format!("{name}{ending}"))
    };
    let buckets: Vec<(f64, f64)> = of("_bucket")
        .map(|(_, labels, count)| (labels["le"].replace("+Inf", "inf").parse().unwrap(), *count))
        .collect();
    assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name}: {buckets:?}");
    let (last, count) = *buckets.last().unwrap();
    let total = of("_count").next().unwrap().2;
    assert!(last.is_infinite() && count == total && of("_sum").count() == 1, "{name}: {buckets:?}");
}

#[test]
fn the_text_is_what_openmetrics_asks_for_and_counts_what_was_done() {
    let families = parse(&metrics());
    let value = |family: &str, name: &str, label: Option<(&str, &str)>| {
        let fits = |labels: &BTreeMap<String, String>| {
            label.is_none_or(|(name, value)| labels.get(name).is_some_and(|found| found == value))
        };
        let found = families[family].samples.iter().find(|(found, labels, _)| found == name && fits(labels));
        found.unwrap_or_else(|| panic!("{name} {label:?}")).2
    };
    assert_eq!(value("nwfilter_ports", "nwfilter_ports", Some(("state", "filtered"))), 2.0);
    assert_eq!(value("nwfilter_filters", "nwfilter_filters", None), 3.0);
    let dropped = families["nwfilter_dropped_packets"].samples.iter();
    let dropped: Vec<_> =
        dropped.filter(|(_, labels, _)| labels.get("port").is_some_and(|port| port == "p4")).collect();
    let [(_, labels, count)] = dropped[..] else { panic!("{dropped:?}") };
    assert_eq!((labels["filter"].as_str(), *count), ("drop", 7.0));
    assert_eq!(value("nwfilter_leases", "nwfilter_leases", None), 0.0);
    // One names no filter, and one is refused by the backend.
    assert_eq!(value("nwfilter_refused_changes", "nwfilter_refused_changes_total", None), 2.0);
    assert_eq!(value("nwfilter_refusals", "nwfilter_refusals_total", None), 1.0);
    assert_eq!(value("nwfilter_attach_seconds", "nwfilter_attach_seconds_count", None), 3.0);
    assert!(value("nwfilter_attach_seconds", "nwfilter_attach_seconds_sum", None) > 0.0);
}

fn root() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The names that begin as ours do.
fn named_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    let names = text
        .match_indices("nwfilter_")
        .map(|(at, _)| text[at..].chars().take_while(|c| is_part(*c)).collect());
    names.collect()
}

#[test]
fn every_query_of_the_dashboard_names_a_metric() {
    let known: BTreeSet<String> =
        parse(&metrics()).iter().flat_map(|(name, family)| Family::names(name, &family.kind)).collect();
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(root().join("dist/grafana.json")).unwrap()).unwrap();
    let mut asked = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{panel}");
        for target in targets {
            let expression = target["expr"].as_str().unwrap();
            let names = named_in(expression);
            assert!(!names.is_empty() && names.is_subset(&known), "{expression}");
            let balanced =
                |open, close| expression.matches(open).count() == expression.matches(close).count();
            assert!(balanced('(', ')') && balanced('{', '}') && balanced('[', ']'), "{expression}");
            asked.extend(names);
        }
    }
    assert!(asked.len() > 10, "{asked:?}");
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        assert!(named_in(variable["query"].as_str().unwrap()).is_subset(&known), "{variable}");
    }
}

#[test]
fn the_manual_lists_every_metric_and_no_other() {
    let manual = fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let ended =
        |(name, family): (String, Family)| if family.kind == "counter" { name + "_total" } else { name };
    let known: BTreeSet<String> = parse(&metrics()).into_iter().map(ended).collect();
    assert_eq!(named_in(&manual), known);
}
