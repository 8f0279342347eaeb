//! The rate of frames is that of frames that get through.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use nwfilter_rules::Backend;
use nwfilter_testlab::rate::{Between, RateLab};
use nwfilter_testlab::{Need, skip_unless};
use nwfilter_xml::{Filter, FilterName, read_filter};
use nwfilter_xtables::Xtables;

const RUN: Duration = Duration::from_millis(20);

fn filters(text: &str) -> BTreeMap<FilterName, Filter> {
    let filter = read_filter("filter", text).into_result().unwrap();
    BTreeMap::from([(filter.name.clone(), filter)])
}

#[test]
fn a_host_with_filtered_ports_has_a_rate() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let lab = RateLab::new(8, Between::Filtered).unwrap();
    assert_eq!(lab.measured().len(), 6);
    let error = lab.frames_a_second(RUN).unwrap_err();
    assert_eq!(error.to_string(), "frames of an unknown connection get through");
    let by_state = "<filter name='f'>
      <rule action='accept' direction='inout'><all state='ESTABLISHED'/></rule>
      <rule action='drop' direction='inout'><all/></rule>
    </filter>";
    lab.filter(&Xtables::default(), &filters(by_state), "f").unwrap();
    assert!(lab.frames_a_second(RUN).unwrap() > 0.0);
    lab.filter(&Xtables::default(), &filters(&by_state.replace("accept", "drop")), "f").unwrap();
    let error = lab.frames_a_second(RUN).unwrap_err();
    assert_eq!(error.to_string(), "frames of a known connection do not get through");
    let all = lab.host().enter(|| Xtables::default().installed()).unwrap();
    assert_eq!(all.ports.len(), 10);
}

#[test]
fn ports_without_a_filter_have_a_rate_beside_those_with_one() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let nothing = "<filter name='f'><rule action='drop' direction='inout'><all/></rule></filter>";
    for (between, measured) in [(Between::Unfiltered, 6), (Between::Uplinks, 2)] {
        let lab = RateLab::new(8, between).unwrap();
        lab.filter(&Xtables::default(), &filters(nothing), "f").unwrap();
        let installed = lab.host().enter(|| Xtables::default().installed()).unwrap();
        let measured_ports = lab.measured();
        assert_eq!((installed.ports.len(), measured_ports.len()), (8, measured));
        assert!(installed.ports.iter().all(|port| !measured_ports.contains(port.as_str())));
        assert!(lab.frames_a_second(RUN).unwrap() > 0.0);
    }
}
