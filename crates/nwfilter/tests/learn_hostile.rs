//! A neighbour on the same bridge does not decide which address a guest has.

#![allow(clippy::unwrap_used)] // The lint does not see that the helpers are tests.

mod learn_support;

use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use dhcproto::v4::MessageType;
use learn_support::*;
use nwfilter::xml::{Uuid, read_binding};
use nwfilter::{BindingState, Driver, Event};
use nwfilter_testlab::{Host, Libvirtd, Mac, Need, Tap, frames, port_dev, skip_unless};

const DHCP: (&str, &str) = ("CTRL_IP_LEARNING", "dhcp");
const FORGED: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 66);
const FREE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 77);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
/// A transaction that the guest never opened.
const UNASKED: u32 = 8;

/// A guest, a neighbour with a binding of its own, and the way out to the server.
struct Street {
    lab: Lab,
    guest: Tap,
    neighbour: Tap,
    net: Tap,
    driver: Driver,
}

/// The guest is bound with these parameters, the neighbour with this filter.
fn street(params: &[(&str, &str)], neighbours: &str) -> Result<Street> {
    let lab = Lab::new()?;
    let (guest, neighbour, net) = (lab.host.tap("tap0")?, lab.host.tap("tap1")?, lab.host.tap("tap2")?);
    let driver = lab.driver()?;
    let servers = "<filter name='server'><rule action='accept' direction='out'><udp srcportstart='67'/></rule></filter>";
    lab.host.enter(|| driver.define_filter("server.xml", servers))?;
    bind_neighbour(&lab, &driver, neighbours)?;
    lab.bind(&driver, "tap0", "clean-traffic", params)?;
    Ok(Street { lab, guest, neighbour, net, driver })
}

/// The neighbour belongs to another guest, and has the server's addresses.
fn bind_neighbour(lab: &Lab, driver: &Driver, filter: &str) -> Result<()> {
    let address = SERVER_ADDRESS.to_string();
    let text = binding("tap1", filter, SERVER, &[("IP", &address)]);
    let mut binding = read_binding("b.xml", &text).into_result()?;
    binding.owner.uuid = Uuid::from_u128(1);
    lab.host.enter(|| driver.replace_binding(binding))?;
    Ok(())
}

fn refused(address: Ipv4Addr) -> BindingState {
    BindingState::Refused { address: address.into() }
}

fn claim(address: Ipv4Addr) -> Vec<u8> {
    frames::arp(GUEST, Mac::BROADCAST, frames::Arp::request(GUEST, address, FREE))
}

impl Street {
    fn asks(&self) -> Result<()> {
        self.guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))
    }

    fn has(&self, addresses: &[&str]) -> Result<()> {
        has(&self.lab, &self.driver, "tap0", addresses)
    }
}

fn unasked(address: Ipv4Addr, seconds: u32) -> Vec<u8> {
    let mut message = ack(GUEST, address, seconds);
    message.set_xid(UNASKED);
    answer(&message)
}

#[test]
fn an_answer_that_the_guest_did_not_ask_for_is_not_believed() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    for params in [&[][..], &[DHCP]] {
        let street = street(params, "clean-traffic")?;
        street.net.send(&answer(&ack(GUEST, FORGED, 600)))?;
        street.asks()?;
        street.net.send(&unasked(FORGED, 600))?;
        street.net.send(&answer(&ack(GUEST, ADDRESS, 600)))?;
        // The transaction is over.
        street.net.send(&answer(&ack(GUEST, FORGED, 600)))?;
        street.has(&["10.0.0.2"]).with_context(|| format!("{params:?}"))?;
    }
    Ok(())
}

#[test]
fn an_answer_that_comes_minutes_after_the_request_is_not_believed() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[DHCP], "clean-traffic")?;
    street.asks()?;
    let mut renewed = request(MessageType::Request, ADDRESS);
    renewed.set_xid(UNASKED);
    street.guest.send(&asked(&renewed, GUEST))?;
    street.net.send(&unasked(ADDRESS, 600))?;
    street.has(&["10.0.0.2"])?;
    street.lab.clock.advance(Duration::from_secs(120));
    street.net.send(&answer(&ack(GUEST, FORGED, 600)))?;
    exchange(&street.guest, &street.net, FREE, 600)?;
    street.has(&["10.0.0.2", "10.0.0.77"])
}

#[test]
fn an_answer_in_an_open_transaction_is_not_believed_from_a_bound_port() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    for params in [&[][..], &[DHCP], &[DHCP, ("DHCPSERVER", "10.0.0.1")]] {
        let street = street(params, "clean-traffic")?;
        street.asks()?;
        let forged = answer(&ack(GUEST, FORGED, 600));
        assert!(street.neighbour.delivers(&street.guest, &forged)?, "the neighbour's filter lets it through");
        street.net.send(&answer(&ack(GUEST, ADDRESS, 600)))?;
        street.has(&["10.0.0.2"]).with_context(|| format!("{params:?}"))?;
    }
    Ok(())
}

#[test]
fn an_answer_from_a_bound_port_is_believed_if_its_filter_lets_it_serve_dhcp() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[DHCP], "server")?;
    exchange(&street.guest, &street.neighbour, ADDRESS, 600)?;
    street.has(&["10.0.0.2"])?;

    bind_neighbour(&street.lab, &street.driver, "clean-traffic")?;
    exchange(&street.guest, &street.neighbour, FORGED, 600)?;
    exchange(&street.guest, &street.net, FREE, 600)?;
    street.has(&["10.0.0.2", "10.0.0.77"]).context("its filter was taken away")
}

#[test]
fn an_answer_from_a_bound_port_is_not_believed_after_its_interface_was_made_again() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Street { lab, guest, neighbour, net, driver } = street(&[DHCP], "clean-traffic")?;
    drop(neighbour);
    let neighbour = lab.host.tap("tap1")?;
    // Until the new interface is known, its answers are believed.
    for attempt in 1..=30 {
        let (forged, granted): (Ipv4Addr, Ipv4Addr) =
            ([10, 0, 1, attempt].into(), [10, 0, 2, attempt].into());
        exchange(&guest, &neighbour, forged, 600)?;
        exchange(&guest, &net, granted, 600)?;
        let leases = || -> Result<_> { Ok(addresses_of(&driver.binding_state(&port_dev("tap0"))?)) };
        eventually("the server is believed", || Ok(leases()?.contains(&granted.to_string())))?;
        if !leases()?.contains(&forged.to_string()) {
            return Ok(());
        }
    }
    anyhow::bail!("the neighbour is believed")
}

#[test]
fn a_flood_of_forged_answers_keeps_no_port_from_learning() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[DHCP], "clean-traffic")?;
    street.asks()?;
    let (asked_for, endless) = (answer(&ack(GUEST, FORGED, 600)), unasked(FORGED, 0));
    for _ in 0..1000 {
        street.neighbour.send(&asked_for)?;
        street.net.send(&endless)?;
        street.guest.drain()?;
    }
    street.net.send(&answer(&ack(GUEST, ADDRESS, 600)))?;
    street.has(&["10.0.0.2"])
}

#[test]
fn a_lease_that_the_guest_asked_for_takes_the_place_of_the_oldest_of_too_many() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let lab = Lab::new()?;
    let (guest, net) = (lab.host.tap("tap0")?, lab.host.tap("tap1")?);
    let state_dir = lab.config().state_dir;
    fs::create_dir_all(&state_dir)?;
    let key = format!("d54df46f-1ab5-4a22-8618-4560ef5fac2c-{GUEST}");
    let line = |host: u32| format!("18446744073709551615 {key} 10.0.1.{host} 10.0.0.1\n");
    let mut lines: String = (1..=32).map(line).collect();
    // The first was granted again since.
    lines.push_str(&line(1));
    fs::write(state_dir.join("nwfilter.leases"), lines)?;
    let driver = lab.driver()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    assert_eq!(addresses_of(&driver.binding_state(&port_dev("tap0"))?).len(), 32);
    exchange(&guest, &net, ADDRESS, 600)?;
    let hosts: Vec<_> = [1].into_iter().chain(3..=32).map(|host| format!("10.0.1.{host}")).collect();
    let mut expected: Vec<_> = hosts.iter().map(String::as_str).collect();
    expected.push("10.0.0.2");
    has(&lab, &driver, "tap0", &expected)
}

#[test]
fn an_address_of_the_host_or_a_neighbour_is_not_learned_and_only_dhcp_passes_until_another_is() -> Result<()>
{
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    for taken in [HOST, SERVER_ADDRESS] {
        let street = street(&[], "clean-traffic")?;
        street.lab.host.add_bridge_addr(&format!("{HOST}/24"))?;
        let Street { lab, guest, net, driver, .. } = &street;
        let events = driver.subscribe();
        guest.send(&claim(taken))?;
        let is_refused = || Ok(driver.binding_state(&port_dev("tap0"))? == refused(taken));
        eventually("the address is refused", is_refused)?;
        let told = Event::AddressChanged { port: "tap0".parse()?, state: refused(taken) };
        assert_eq!(events.recv_timeout(SOON)?, told, "its rules are in force");
        assert!(!guest.delivers(net, &claim(taken))?);
        assert!(guest.delivers(net, &asked(&request(MessageType::Request, FREE), GUEST))?);

        let other = lab.passive_driver()?;
        assert_eq!(other.binding_state(&port_dev("tap0"))?, refused(taken), "every process knows it");
        assert_eq!(lab.host.enter(|| other.diff())?.differences, []);
        guest.send(&claim(FREE))?;
        street.has(&["10.0.0.77"])?;
    }
    Ok(())
}

#[test]
fn an_address_that_is_free_again_is_learned_when_the_guest_goes_on_using_it() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[], "clean-traffic")?;
    let Street { lab, guest, driver, .. } = &street;
    guest.send(&claim(SERVER_ADDRESS))?;
    eventually("refused", || Ok(driver.binding_state(&port_dev("tap0"))? == refused(SERVER_ADDRESS)))?;
    lab.host.enter(|| driver.delete_binding(&port_dev("tap1")))?;
    eventually("learned", || {
        lab.clock.advance(Duration::from_secs(30));
        guest.send(&claim(SERVER_ADDRESS))?;
        Ok(driver.binding_state(&port_dev("tap0"))? != refused(SERVER_ADDRESS))
    })?;
    street.has(&["10.0.0.1"])
}

#[test]
fn a_lease_of_an_address_of_the_host_or_a_neighbour_is_refused() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[DHCP], "clean-traffic")?;
    street.lab.host.add_bridge_addr(&format!("{HOST}/24"))?;
    for address in [HOST, SERVER_ADDRESS, FREE] {
        exchange(&street.guest, &street.net, address, 600)?;
    }
    street.has(&["10.0.0.77"])
}

#[test]
fn an_address_may_be_that_of_the_guests_other_port_or_of_a_guest_in_another_bridge() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let street = street(&[], "clean-traffic")?;
    street.lab.host.ip(&["link add br1 type bridge", "link set br1 up", "link set tap1 master br1"])?;
    street.guest.send(&claim(SERVER_ADDRESS))?;
    street.has(&["10.0.0.1"]).context("tap1 is in another bridge")?;

    let text = binding("tap2", "clean-traffic", OTHER, &[]);
    let second = read_binding("b.xml", &text).into_result()?;
    street.lab.host.enter(|| street.driver.create_binding(second))?;
    street.net.send(&packet(OTHER, SERVER_ADDRESS))?;
    has(&street.lab, &street.driver, "tap2", &["10.0.0.1"]).context("both are the guest's")
}

#[test]
fn libvirt_learns_an_address_of_the_host_and_believes_an_answer_that_nobody_asked_for() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"), Need::Libvirtd);
    let host = Host::new()?;
    host.add_bridge_addr(&format!("{HOST}/24"))?;
    let (guest, net) = (host.tap("tap0")?, host.tap("tap1")?);
    let libvirtd = Libvirtd::start(&host)?;
    for (from, frame, params, learned) in
        [(&guest, packet(GUEST, HOST), &[][..], HOST), (&net, unasked(FORGED, 600), &[DHCP], FORGED)]
    {
        libvirtd.bind(&binding("tap0", "clean-traffic", GUEST, params))?;
        patiently("libvirt has learned it", || {
            from.send(&frame)?;
            Ok(host.saved()?.port("tap0").ebtables.contains(&learned.to_string()))
        })?;
        libvirtd.unbind("tap0")?;
    }
    Ok(())
}
