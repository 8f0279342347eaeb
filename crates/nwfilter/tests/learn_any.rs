//! `CTRL_IP_LEARNING` any: the address comes from what the guest does, or from a DHCP server.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod learn_support;

use std::net::Ipv4Addr;
use std::sync::mpsc::channel;

use anyhow::{Context, Result};
use dhcproto::v4::{MessageType, Opcode};
use learn_support::*;
use nwfilter::{BindingState, Driver, Event, Family, Method, Source};
use nwfilter_testlab::{Ends, Host, Libvirtd, Mac, Need, Tap, frames, port_dev, skip_unless};

const UNSPECIFIED: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

struct Ports {
    lab: Lab,
    guest: Tap,
    net: Tap,
    driver: Driver,
}

fn ports() -> Result<Ports> {
    let lab = Lab::new()?;
    let (guest, net) = (lab.host.tap("tap0")?, lab.host.tap("tap1")?);
    let driver = lab.driver()?;
    Ok(Ports { lab, guest, net, driver })
}

/// Binds, sends one frame, and returns what was learned.
fn learned_from(ports: &Ports, from: &Tap, frame: &[u8]) -> Result<Option<(String, Source)>> {
    let events = ports.driver.subscribe();
    ports.lab.bind(&ports.driver, "tap0", "clean-traffic", &[])?;
    ports.guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))?;
    from.send(frame)?;
    let found = eventually("learned", || Ok(!is_learning(&ports.driver, "tap0")?));
    let state = ports.driver.binding_state(&port_dev("tap0"))?;
    if found.is_ok() {
        let told = Event::AddressChanged { port: "tap0".parse()?, state: state.clone() };
        let event = || events.recv_timeout(SOON);
        assert_eq!([event()?, event()?], [Event::BindingCreated("tap0".parse()?), told]);
    }
    ports.lab.host.enter(|| ports.driver.delete_binding(&port_dev("tap0")))?;
    match (found, state) {
        (Ok(()), BindingState::Learned { addresses, source }) => Ok(Some((addresses[0].to_string(), source))),
        _ => Ok(None),
    }
}

#[test]
fn an_address_is_learned_from_arp_from_ipv4_and_from_dhcp_with_and_without_a_vlan_tag() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let ports = ports()?;
    let arp = |arp| frames::arp(GUEST, Mac::BROADCAST, arp);
    let request = arp(frames::Arp::request(GUEST, ADDRESS, SERVER_ADDRESS));
    let reply = arp(frames::Arp::reply(GUEST, ADDRESS, SERVER, SERVER_ADDRESS));
    let granted = answer(&ack(GUEST, ADDRESS, 60));
    for (frame, from, source) in [
        (request, &ports.guest, Source::Arp),
        (reply, &ports.guest, Source::Arp),
        (packet(GUEST, ADDRESS), &ports.guest, Source::Ipv4),
        (granted, &ports.net, Source::Dhcp),
    ] {
        let expected = Some(("10.0.0.2".to_owned(), source));
        assert_eq!(learned_from(&ports, from, &frame)?, expected, "{source}");
        assert_eq!(learned_from(&ports, from, &frames::vlan(5, &frame))?, expected, "{source}, tagged");
    }
    Ok(())
}

#[test]
fn nothing_is_learned_from_another_mac_from_unusable_addresses_or_from_forged_answers() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = &ports()?;
    lab.bind(driver, "tap0", "clean-traffic", &[])?;
    let arp = |from, arp| frames::arp(from, Mac::BROADCAST, arp);
    let mut sent = vec![
        arp(OTHER, frames::Arp::reply(GUEST, ADDRESS, SERVER, SERVER_ADDRESS)),
        arp(GUEST, frames::Arp::reply(OTHER, ADDRESS, SERVER, SERVER_ADDRESS)),
        arp(GUEST, frames::Arp::request(GUEST, UNSPECIFIED, ADDRESS)),
        frames::rarp(GUEST, Mac::BROADCAST, frames::Arp::rarp_request(GUEST)),
        packet(OTHER, ADDRESS),
        frames::vlan(5, &frames::vlan(6, &packet(GUEST, ADDRESS))),
        asked(&request(MessageType::Request, ADDRESS), GUEST),
        // The guest answers itself.
        answer(&ack(GUEST, ADDRESS, 60)),
        answer_from(&ack(GUEST, ADDRESS, 60), SERVER, SERVER_ADDRESS, Mac::BROADCAST),
        answer_from(&ack(GUEST, ADDRESS, 60), OTHER, SERVER_ADDRESS, Mac::BROADCAST),
    ];
    for address in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1], [255, 255, 255, 255]] {
        sent.push(packet(GUEST, address.into()));
    }
    sent.iter().try_for_each(|frame| guest.send(frame))?;
    let received = [
        packet(SERVER, SERVER_ADDRESS),
        answer(&ack(OTHER, ADDRESS, 60)),
        answer_from(&ack(GUEST, ADDRESS, 60), GUEST, SERVER_ADDRESS, GUEST),
        answer(&ack(GUEST, UNSPECIFIED, 60)),
        answer(&dhcp(Opcode::BootReply, MessageType::Nak, GUEST)),
    ];
    received.iter().try_for_each(|frame| net.send(frame))?;
    let waiting = BindingState::Learning { family: Family::Ipv4, method: Method::Any };
    assert_eq!(driver.binding_state(&port_dev("tap0"))?, waiting);
    guest.send(&packet(GUEST, SECOND))?;
    has(lab, driver, "tap0", &["10.0.0.3"])
}

#[test]
fn what_was_learned_survives_filters_and_drivers_but_not_the_binding() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net: _, driver } = ports()?;
    let filter = |action| {
        format!(
            "<filter name='mine' chain='ipv4'><rule action='{action}' direction='out'><ip srcipaddr='$IP'/></rule></filter>"
        )
    };
    lab.host.enter(|| driver.define_filter("mine.xml", &filter("accept")))?;
    lab.bind(&driver, "tap0", "mine", &[])?;
    let provisional = lab.rules("tap0")?;
    guest.send(&packet(GUEST, ADDRESS))?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    assert!(
        driver.binding(&port_dev("tap0"))?.params.get("IP").is_none(),
        "the binding stays as it was given"
    );
    assert_eq!(lab.host.enter(|| driver.diff())?.differences, []);

    lab.host.enter(|| driver.define_filter("mine.xml", &filter("drop")))?;
    assert!(lab.rules("tap0")?.ebtables.contains("--ip-src 10.0.0.2 -j DROP"));

    drop(driver);
    let driver = lab.driver()?;
    assert_eq!(lab.host.enter(|| driver.diff())?.differences, []);
    assert_eq!(addresses_of(&driver.binding_state(&port_dev("tap0"))?), ["10.0.0.2"]);

    lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
    lab.bind(&driver, "tap0", "mine", &[])?;
    assert!(is_learning(&driver, "tap0")?);
    assert_eq!(provisional.diff(&lab.rules("tap0")?), None);
    Ok(())
}

#[test]
fn only_a_lone_ip_is_learned_and_only_as_the_parameter_says() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest: _guest, net: _net, driver } = ports()?;
    let refused = |filter: &str, params: &[(&str, &str)]| -> String {
        let error = lab.bind(&driver, "tap0", filter, params).unwrap_err();
        format!("{error:#}")
    };
    assert!(refused("clean-traffic", &[("CTRL_IP_LEARNING", "none")]).contains("no value for IP"));
    assert!(refused("clean-traffic", &[("CTRL_IP_LEARNING", "NONE")]).contains("no value for IP"));
    let unknown = refused("clean-traffic", &[("CTRL_IP_LEARNING", "bogus")]);
    assert!(unknown.contains("CTRL_IP_LEARNING is 'bogus', but must be any, dhcp or none"), "{unknown}");
    let server = refused("clean-traffic", &[("CTRL_IP_LEARNING", "dhcp"), ("DHCPSERVER", "10.0.0.300")]);
    assert!(server.contains("DHCPSERVER is '10.0.0.300'"), "{server}");
    let two = "<filter name='two' chain='arp'><rule action='drop' direction='out'>\
        <arp arpsrcipaddr='$IP' arpdstipaddr='$GATEWAY'/></rule></filter>";
    lab.host.enter(|| driver.define_filter("two.xml", two))?;
    assert!(refused("two", &[]).contains("no value for GATEWAY, IP"));
    assert!(lab.rules("tap0")?.is_empty());
    for value in ["Any", "DHCP"] {
        lab.bind(&driver, "tap0", "clean-traffic", &[("CTRL_IP_LEARNING", value)])?;
        assert!(is_learning(&driver, "tap0")?);
        lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
    }
    assert!(lab.rules("tap0")?.is_empty());
    Ok(())
}

#[test]
fn an_ipv6_address_is_learned_from_neighbour_discovery_where_only_that_is_missing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net: _net, driver } = ports()?;
    lab.bind(&driver, "tap0", "no-ipv6-spoofing", &[])?;
    assert_eq!(
        driver.binding_state(&port_dev("tap0"))?,
        BindingState::Learning { family: Family::Ipv6, method: Method::Any }
    );
    let solicit = |target: &str| -> Result<Vec<u8>> {
        let target: std::net::Ipv6Addr = target.parse()?;
        let group: std::net::Ipv6Addr = "ff02::1:ff00:2".parse()?;
        let ends =
            Ends::v6(GUEST, std::net::Ipv6Addr::UNSPECIFIED, Mac::new([0x33, 0x33, 0xff, 0, 0, 2]), group);
        let mut frame = frames::icmp(&ends, 135, 0, &[&[0; 4][..], &target.octets()].concat());
        frame[14 + 7] = 255;
        Ok(frame)
    };
    guest.send(&solicit("fe80::2")?)?;
    has(&lab, &driver, "tap0", &["fe80::2"])?;
    guest.send(&solicit("fe80::3")?)?;
    guest.send(&solicit("fd00::2")?)?;
    has(&lab, &driver, "tap0", &["fe80::2", "fd00::2"])?;
    guest.send(&solicit("fd00::3")?)?;
    // The port is no longer listened to, and its filter stays.
    has(&lab, &driver, "tap0", &["fe80::2", "fd00::2"])
}

#[test]
fn the_rules_before_and_after_learning_are_those_of_libvirt() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Libvirtd);
    let Ports { lab, guest, net, driver } = ports()?;
    let theirs = Host::new()?;
    let (their_guest, their_net) = (theirs.tap("tap0")?, theirs.tap("tap1")?);
    let libvirtd = Libvirtd::start(&theirs)?;
    let seed = include_str!("../../../xml-fixtures/seed/ftp-by-port.xml");
    libvirtd.define(seed)?;
    lab.host.enter(|| driver.define_filter("seed.xml", seed))?;

    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], bool, Vec<u8>);
    let cases: [Case<'_>; 4] = [
        ("no-ip-spoofing", &[], true, packet(GUEST, ADDRESS)),
        ("clean-traffic", &[], true, frames::vlan(5, &packet(GUEST, ADDRESS))),
        ("ftp-by-port", &[], false, answer(&ack(GUEST, ADDRESS, 600))),
        (
            "clean-traffic",
            &[("CTRL_IP_LEARNING", "dhcp"), ("DHCPSERVER", "10.0.0.1"), ("DHCPSERVER", "10.0.0.3")],
            false,
            answer(&ack(GUEST, ADDRESS, 600)),
        ),
    ];
    for (filter, params, by_guest, frame) in cases {
        lab.bind(&driver, "tap0", filter, params)?;
        libvirtd.bind(&binding("tap0", filter, GUEST, params))?;
        let provisional = lab.rules("tap0")?;
        // libvirt's thread puts the rules there some time after the port is bound, and listens still later.
        let same = || Ok(theirs.saved()?.port("tap0").diff(&provisional).is_none());
        patiently("libvirt's provisional rules are there, and the same", same)?;

        let (sender, their_sender) = if by_guest { (&guest, &their_guest) } else { (&net, &their_net) };
        if !by_guest {
            guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))?;
        }
        sender.send(&frame)?;
        has(&lab, &driver, "tap0", &["10.0.0.2"])?;
        let ours = comparable(lab.rules("tap0")?);
        let same = patiently("libvirt has learned, and has the same rules", || {
            their_sender.send(&frame)?;
            Ok(comparable(theirs.saved()?.port("tap0")) == ours)
        });
        let difference = theirs.saved()?.port("tap0").diff(&lab.rules("tap0")?);
        same.with_context(|| format!("{filter} {params:?}: {difference:?}"))?;
        lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
        libvirtd.unbind("tap0")?;
    }
    Ok(())
}

/// Sub-chains of equal priority come in chance order in libvirt, and libvirt gives no conntrack helpers.
fn comparable(saved: nwfilter_testlab::Saved) -> (Vec<String>, Vec<String>) {
    let sorted = |lines: Vec<String>| {
        let mut lines = lines;
        lines.sort();
        lines
    };
    use nwfilter_testlab::Tool;
    (sorted(saved.table(Tool::Ebtables, "nat")), saved.table(Tool::Iptables, "filter"))
}

#[test]
fn one_of_two_drivers_on_a_store_learns_and_the_other_takes_over_when_it_ends() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net: _net, driver } = ports()?;
    let second = lab.host.tap("tap2")?;
    let other = lab.driver()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[])?;
    lab.host.enter(|| -> Result<()> {
        let text = binding("tap2", "clean-traffic", OTHER, &[]);
        other.create_binding(nwfilter::xml::read_binding("b.xml", &text).into_result()?)?;
        Ok(())
    })?;
    guest.send(&packet(GUEST, ADDRESS))?;
    has(&lab, &other, "tap0", &["10.0.0.2"])?;

    drop(driver);
    let spoken = || {
        second.send(&packet(OTHER, SERVER_ADDRESS))?;
        Ok(!addresses_of(&other.binding_state(&port_dev("tap2"))?).is_empty())
    };
    eventually("the other driver has learned", spoken)?;
    has(&lab, &other, "tap2", &["10.0.0.1"])
}

#[test]
fn a_port_that_comes_back_under_its_name_is_listened_to_again() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net: _net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[])?;
    drop(guest);
    let guest = lab.host.tap("tap0")?;
    eventually("learned", || {
        guest.send(&packet(GUEST, ADDRESS))?;
        Ok(!is_learning(&driver, "tap0")?)
    })?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])
}

#[test]
fn the_status_of_a_port_says_that_no_process_learns_its_address() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    let _guest = lab.host.tap("tap0")?;
    let driver = lab.passive_driver()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[])?;
    let (family, method) = (Family::Ipv4, Method::Any);
    let unattended = BindingState::Unattended { family, method };
    assert_eq!(driver.binding_state(&port_dev("tap0"))?, unattended);
    let (ready, is_ready) = channel();
    std::thread::scope(|scope| -> Result<()> {
        let learner = scope.spawn(|| lab.host.enter(|| driver.learn(|| ready.send(()).unwrap())));
        is_ready.recv_timeout(SOON)?;
        assert_eq!(driver.binding_state(&port_dev("tap0"))?, BindingState::Learning { family, method });
        assert_eq!(
            driver.port_statuses()?[0].state.as_ref().ok(),
            Some(&BindingState::Learning { family, method })
        );
        lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
        Ok(learner.join().unwrap()?)
    })?;
    lab.bind(&driver, "tap0", "clean-traffic", &[])?;
    // A process that another test forks has the learner's lock, too, until it executes its program.
    eventually("nobody learns", || Ok(driver.binding_state(&port_dev("tap0"))? == unattended))
}
