//! The documents under xml-fixtures that are right.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::fixtures;
use nwfilter_xml::schema::PROTOCOLS;
use nwfilter_xml::{
    Field, Filter, Matches, NoBinding, Protocol, Rule, Value, read_binding, read_domain, read_filter,
    write_binding, write_binding_status, write_filter,
};

fn every_filter() -> Vec<(String, String)> {
    ["seed", "stock", "filters"].into_iter().flat_map(fixtures).collect()
}

#[test]
fn every_filter_is_read_and_is_the_same_when_written_and_read_again() {
    for (name, text) in every_filter() {
        let filter = read_filter(&name, &text).into_result().unwrap_or_else(|problems| panic!("{problems}"));
        let written = write_filter(&filter);
        let again = read_filter(&name, &written).into_result().map(Filter::without_places);
        assert_eq!(again, Ok(filter.clone().without_places()), "{written}");
        assert_eq!(write_filter(&filter), written);
    }
}

#[test]
fn what_is_written_gives_no_warnings() {
    for (name, text) in every_filter() {
        let Ok(filter) = read_filter(&name, &text).into_result() else { panic!("{name}") };
        let again = read_filter(&name, &write_filter(&filter)).diagnostics;
        // A sign, or an attribute without effect, is what the filter says, however it is written.
        let unavoidable = ["because its sign is that of", "has no effect"];
        let surprising =
            again.items.iter().find(|d| !unavoidable.iter().any(|text| d.message.contains(text)));
        assert_eq!(surprising, None, "{name}");
    }
}

#[test]
fn each_protocol_has_a_fixture_that_uses_every_attribute_of_it() {
    for spec in PROTOCOLS {
        let (_, text) = fixtures("filters")
            .into_iter()
            .find(|(name, _)| *name == format!("{}.xml", spec.element))
            .unwrap_or_else(|| panic!("no fixture for <{}>", spec.element));
        let filter = read_filter(spec.element, &text).into_result().unwrap();
        let rules: Vec<&Matches> = filter.rules().filter_map(|rule| rule.matches.as_ref()).collect();
        let with = |field, variable: bool| {
            let item = rules.iter().filter_map(move |matches| matches.get(field));
            item.filter(move |item| matches!(item.value, Value::Variable(_)) == variable).collect::<Vec<_>>()
        };
        assert!(rules.iter().all(|matches| matches.protocol == spec.protocol));
        for row in spec.attributes {
            let what = format!("<{} {}>", spec.element, row.name);
            let all = matches!(spec.protocol, Protocol::All | Protocol::AllOn6);
            // With flags given, libvirt drops the ipset of the other protocols.
            let only_default = row.field == Field::IpSetFlags && !all;
            // libvirt takes no IPv6 address here.
            let no_literal = row.field == Field::DstIpTo
                && spec
                    .protocol
                    .attribute(Field::SrcIpFrom)
                    .is_some_and(|a| a.kind == nwfilter_xml::Kind::Ipv6);
            // Ports need a protocol that is known.
            let no_variable = row.field == Field::IpProtocol || only_default;
            assert!(no_literal || !with(row.field, false).is_empty(), "{what} as a literal");
            assert!(no_variable || !with(row.field, true).is_empty(), "{what} as a variable");
        }
        assert!(filter.rules().flat_map(Rule::variables).next().is_some());
    }
}

#[test]
fn bindings_are_written_as_libvirt_writes_them() {
    for (name, text) in fixtures("bindings") {
        let binding =
            read_binding(&name, &text).into_result().unwrap_or_else(|problems| panic!("{problems}"));
        let written = write_binding(&binding);
        assert_eq!(read_binding(&name, &written).into_result().as_ref(), Ok(&binding));
        assert_eq!(read_binding(&name, &write_binding_status(&binding)).into_result().as_ref(), Ok(&binding));
        insta::assert_snapshot!(format!("binding {name}"), written);
    }
}

#[test]
fn a_domain_gives_its_interfaces_and_their_bindings() {
    for (name, text) in fixtures("domains") {
        let reading = read_domain(&name, &text);
        assert_eq!(reading.diagnostics.to_string(), "");
        let domain = reading.value.unwrap();
        let bindings = domain.interfaces.iter().map(|interface| match domain.binding(interface) {
            Ok(binding) => write_binding(&binding),
            Err(why) => format!("{} at {}: {why}\n", interface.kind, interface.place),
        });
        insta::assert_snapshot!(format!("domain {name}"), bindings.collect::<String>());
    }
}

#[test]
fn an_interface_tells_what_it_is_connected_to() {
    let (_, text) = fixtures("domains").into_iter().find(|(name, _)| name == "running.xml").unwrap();
    let domain = read_domain("running.xml", &text).into_result().unwrap();
    let [bridge, network, direct, unfiltered] = &domain.interfaces[..] else { panic!("{domain:?}") };
    assert_eq!((bridge.kind.as_str(), bridge.bridge.as_deref()), ("bridge", Some("br0")));
    assert_eq!(bridge.filter.as_ref().unwrap().params.get("IP").unwrap(), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!((network.network.as_deref(), network.bridge.as_deref()), (Some("default"), Some("virbr0")));
    assert_eq!(
        (direct.link.as_deref(), direct.target.as_ref().unwrap().as_str()),
        (Some("eth0"), "macvtap0")
    );
    assert_eq!(domain.binding(unfiltered), Err(NoBinding::Filter));
}
