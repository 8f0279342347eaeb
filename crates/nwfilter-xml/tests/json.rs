//! The model as JSON: what is written is read again, places included, and what cannot be in a document is refused.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fmt::Debug;

use common::fixtures;
use nwfilter_testlab::generate::{Generator, Options};
use nwfilter_xml::{
    Action, Binding, Direction, Filter, Protocol, read_binding, read_domain, read_filter, write_filter,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

fn is_read_again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    let json = serde_json::to_string(value).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&json).expect(&json), value, "{json}");
}

#[test]
fn every_document_is_the_same_when_written_as_json_and_read_again() {
    for (name, text) in ["seed", "stock", "filters"].into_iter().flat_map(fixtures) {
        is_read_again(&read_filter(&name, &text).into_result().unwrap());
    }
    for (name, text) in fixtures("bindings") {
        is_read_again(&read_binding(&name, &text).into_result().unwrap());
    }
    for (name, text) in fixtures("domains") {
        is_read_again(&read_domain(&name, &text).into_result().unwrap());
    }
}

#[test]
fn generated_filters_are_the_same_when_written_as_json_and_read_again() {
    for seed in 0..512 {
        let options = Options { like_libvirt: false, ..Options::default() };
        let filter = Generator::with_options(seed, options).filter("random".parse().unwrap());
        is_read_again(&filter);
        // With the places that a document has.
        is_read_again(&read_filter("f.xml", &write_filter(&filter)).into_result().unwrap());
    }
}

const FILTER: &str = "<filter name='web' chain='ipv4'>
  <filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.2'/></filterref>
  <rule action='accept' direction='in'><tcp dstportstart='$PORTS[@1]' state='NEW,ESTABLISHED'/></rule>
</filter>";

#[test]
fn json_has_the_words_of_xml() {
    let filter = read_filter("web.xml", FILTER).into_result().unwrap();
    let expected = json!({
        "name": "web", "uuid": null, "chain": "ipv4", "priority": -700,
        "entries": [
            {"include": {
                "filter": "clean-traffic", "params": {"IP": ["10.0.0.2"]}, "place": {"line": 2, "column": 3},
            }},
            {"rule": {
                "action": "accept", "direction": "in", "priority": 500, "statematch": true,
                "matches": {"protocol": "tcp", "items": [
                    {
                        "attribute": "state", "value": "NEW,ESTABLISHED", "negated": false,
                        "place": {"line": 3, "column": 71},
                    },
                    {
                        "attribute": "dstportstart", "value": "$PORTS[@1]", "negated": false,
                        "place": {"line": 3, "column": 45},
                    },
                ]},
                "place": {"line": 3, "column": 3},
            }},
        ],
    });
    assert_eq!(serde_json::to_value(&filter).unwrap(), expected);
    let written = |text: &str| {
        let filter = read_filter("f.xml", text).into_result().unwrap();
        let items = filter.rules().flat_map(|rule| &rule.matches).flat_map(|matches| matches.items.clone());
        items.map(|item| item.to_string()).collect::<Vec<_>>()
    };
    let text =
        "<filter name='f'><rule action='drop' direction='in'><arp opcode='2' hwtype='0x10'/></rule></filter>";
    assert_eq!(written(text), ["hwtype='0x10'", "opcode='Reply'"]);
}

#[test]
fn json_that_says_what_no_document_can_is_refused() {
    let filter = serde_json::to_value(read_filter("web.xml", FILTER).into_result().unwrap()).unwrap();
    let rule = &filter["entries"][1]["rule"];
    let refusals = [
        ("/name", "a/b".into(), "filter name"),
        ("/priority", 1001.into(), "1001 is no priority"),
        ("/entries/0/include/params/IP/0", "10.0.0.2/24".into(), "'10.0.0.2/24' cannot be a value"),
        ("/entries/1/rule/action", "Accept".into(), "'Accept' cannot be an action"),
        ("/entries/1/rule/matches/protocol", "tpc".into(), "'tpc' cannot be a protocol"),
        (
            "/entries/1/rule/matches/items/0/attribute",
            "dstportstrt".into(),
            "'dstportstrt' cannot be a condition",
        ),
        ("/entries/1/rule/matches/items/1/value", "65536".into(), "'65536' cannot be a dstportstart"),
        ("/entries/1/rule/matches/items/1/value", "$A B".into(), "'$A B'"),
        ("/entries/1/rule", json!({"acton": 1}), "unknown field `acton`"),
        (
            "/entries/1/rule/matches/items",
            vec![rule["matches"]["items"][0].clone(), rule["matches"]["items"][0].clone()].into(),
            "second condition",
        ),
    ];
    for (path, wrong, why) in refusals {
        let mut changed = filter.clone();
        *changed.pointer_mut(path).expect(path) = wrong;
        let refused = serde_json::from_value::<Filter>(changed).unwrap_err().to_string();
        assert!(refused.contains(why), "{path}: {refused}");
    }
}

#[test]
fn places_may_be_left_out_and_conditions_given_in_any_order() {
    let rule = |items: &str| {
        let json = format!(
            "{{\"name\": \"f\", \"uuid\": null, \"chain\": \"root\", \"priority\": 0, \"entries\": [{{\"rule\":
              {{\"action\": \"drop\", \"direction\": \"in\", \"priority\": 500, \"statematch\": true,
                \"matches\": {{\"protocol\": \"tcp\", \"items\": [{items}]}}}}}}]}}"
        );
        serde_json::from_str::<Filter>(&json).expect(&json)
    };
    let (first, second) = (
        "{\"attribute\": \"srcipaddr\", \"value\": \"10.0.0.1\"}",
        "{\"attribute\": \"dscp\", \"value\": \"3\"}",
    );
    assert_eq!(rule(&format!("{first}, {second}")), rule(&format!("{second}, {first}")));
}

#[test]
fn words_are_read_as_they_are_written() {
    for (action, name) in Action::NAMES {
        assert_eq!((name.parse(), action.to_string().as_str()), (Ok(action), name));
    }
    for (direction, name) in Direction::NAMES {
        assert_eq!((name.parse(), direction.to_string().as_str()), (Ok(direction), name));
    }
    assert_eq!(Protocol::TcpOn6.to_string().parse(), Ok(Protocol::TcpOn6));
}

#[test]
fn a_builder_refuses_what_is_missing_or_no_part_of_a_binding() {
    let complete = || {
        let builder = Binding::builder().owner("vm", nwfilter_xml::Uuid::from_u128(7)).port("vnet0");
        builder.mac("52:54:00:7B:35:93").filter("web").parameter("IP", "10.0.0.2").parameter("IP", "10.0.0.3")
    };
    let binding = complete().build().unwrap();
    assert_eq!(
        (binding.mac.to_string().as_str(), binding.params.get("IP").unwrap().len()),
        ("52:54:00:7b:35:93", 2)
    );
    for (builder, why) in [
        (Binding::builder(), "'' cannot be an owner: it is missing"),
        (complete().port("a b"), "'a b' cannot be a port device"),
        (complete().mac("x"), "'x' cannot be a MAC address"),
        (complete().filter(""), "'' cannot be a filter name: it is empty"),
        (complete().parameter("A-B", "1"), "'A-B' cannot be a variable name"),
        (complete().parameter("IP", "10.0.0.2/24"), "'10.0.0.2/24' cannot be a value"),
    ] {
        let refused = builder.build().unwrap_err().to_string();
        assert!(refused.starts_with(why), "{refused}");
    }
}
