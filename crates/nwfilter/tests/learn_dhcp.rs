//! `CTRL_IP_LEARNING` dhcp: the address is that of the leases, for as long as they last.

mod learn_support;

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder};
use learn_support::*;
use nwfilter::{BindingState, Config, Driver};
use nwfilter_testlab::{Ends, Guest, Mac, Need, Process, Tap, frames, port_dev, skip_unless};
use nwfilter_xtables::Xtables;

const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
const ROGUE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 66);
const DHCP: (&str, &str) = ("CTRL_IP_LEARNING", "dhcp");

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

fn granted(address: Ipv4Addr, seconds: u32) -> Vec<u8> {
    answer(&ack(GUEST, address, seconds))
}

fn remaining(driver: &Driver) -> Result<Duration> {
    match driver.binding_state(&port_dev("tap0"))? {
        BindingState::Leased { leases } => leases[0].remaining.context("the lease has an end"),
        other => anyhow::bail!("{other}"),
    }
}

#[test]
fn leases_make_a_list_and_expiry_release_and_decline_take_them_away() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    let provisional = lab.rules("tap0")?;

    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    exchange(&guest, &net, SECOND, 60)?;
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"])?;
    lab.pass(Duration::from_secs(59), &guest)?;
    assert_eq!(remaining(&driver)?, Duration::from_secs(541));
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"])?;
    lab.pass(Duration::from_secs(1), &guest)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"]).context("the second lease ends by itself")?;
    eventually("its rules go", || Ok(!lab.rules("tap0")?.ebtables.contains("10.0.0.3 ")))?;

    exchange(&guest, &net, ADDRESS, 900)?;
    eventually("renewed", || Ok(remaining(&driver)? == Duration::from_secs(900)))?;
    assert_eq!(lab.host.enter(|| driver.diff())?.differences, []);

    guest.send(&asked(&request(MessageType::Release, ADDRESS), OTHER))?;
    exchange(&guest, &net, SECOND, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"]).context("another MAC address cannot release")?;
    guest.send(&asked(&request(MessageType::Release, SECOND), GUEST))?;
    guest.send(&asked(&request(MessageType::Release, ADDRESS), GUEST))?;
    eventually("released", || is_learning(&driver, "tap0"))?;
    eventually("back to DHCP only", || Ok(provisional.diff(&lab.rules("tap0")?).is_none()))?;

    exchange(&guest, &net, SECOND, u32::MAX)?;
    has(&lab, &driver, "tap0", &["10.0.0.3"])?;
    guest.send(&asked(&request(MessageType::Decline, SECOND), GUEST))?;
    eventually("declined", || is_learning(&driver, "tap0"))
}

#[test]
fn a_refusal_ends_what_was_asked_for_in_its_transaction_and_nothing_else() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    let nak = answer(&dhcp(Opcode::BootReply, MessageType::Nak, GUEST));
    net.send(&nak)?;
    exchange(&guest, &net, SECOND, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"]).context("nothing was asked for")?;
    guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))?;
    net.send(&nak)?;
    has(&lab, &driver, "tap0", &["10.0.0.3"]).context("refused")
}

#[test]
fn a_server_that_is_not_listed_is_not_believed_nor_is_the_guest_itself() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP, ("DHCPSERVER", "10.0.0.1")])?;
    guest.send(&asked(&request(MessageType::Request, ROGUE), GUEST))?;
    net.send(&answer_from(&ack(GUEST, ROGUE, 600), OTHER, ROGUE, GUEST))?;
    guest.send(&granted(ROGUE, 600))?;
    guest.send(&answer_from(&ack(GUEST, ROGUE, 600), GUEST, SERVER_ADDRESS, GUEST))?;
    guest.send(&packet(GUEST, ROGUE))?;
    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    // clean-traffic lets every DHCP server's answers through: the learner does not rely on the rules.
    guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))?;
    net.send(&answer_from(&ack(GUEST, ROGUE, 600), OTHER, ROGUE, GUEST))?;
    net.send(&answer_from(&dhcp(Opcode::BootReply, MessageType::Nak, GUEST), OTHER, ROGUE, GUEST))?;
    exchange(&guest, &net, SECOND, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"])
}

#[test]
fn leases_outlive_the_driver_in_the_file_format_of_libvirt() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    exchange(&guest, &net, SECOND, u32::MAX)?;
    has(&lab, &driver, "tap0", &["10.0.0.2", "10.0.0.3"])?;
    drop(driver);

    let file = lab.config().state_dir.join("nwfilter.leases");
    let text = fs::read_to_string(&file)?;
    let key = format!("d54df46f-1ab5-4a22-8618-4560ef5fac2c-{GUEST}");
    assert!(text.contains(&format!(" {key} 10.0.0.2 10.0.0.1\n")), "{text}");
    assert!(text.contains(&format!("18446744073709551615 {key} 10.0.0.3 10.0.0.1\n")), "{text}");

    let driver = lab.driver()?;
    assert_eq!(addresses_of(&driver.binding_state(&port_dev("tap0"))?), ["10.0.0.2", "10.0.0.3"]);
    assert_eq!(lab.host.enter(|| driver.diff())?.differences, []);
    drop(driver);

    // As libvirt leaves it, and with what a crash may leave: a line of nonsense, a line without an end.
    let libvirts = format!(
        "1 {key} 10.0.0.2 0.0.0.0\n0 {key} 10.0.0.3 0.0.0.0\nnonsense\n\
                            18446744073709551615 {key} 10.0.0.4 10.0.0.77"
    );
    fs::write(&file, libvirts)?;
    let driver = lab.driver()?;
    lab.host.enter(|| driver.reload())?;
    has(&lab, &driver, "tap0", &["10.0.0.4"])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.4", "10.0.0.2"])?;
    assert!(fs::read_to_string(&file)?.contains("10.0.0.77\n"));
    Ok(())
}

#[test]
fn the_lease_file_is_libvirts_own_where_the_bindings_are() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    drop(driver);
    let config = Config::new(lab.config().config_dir, lab.dir.path().join("nwfilter-binding"));
    let driver = Driver::open(config, Xtables::default())?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    assert!(lab.dir.path().join("network/nwfilter.leases").exists());
    Ok(())
}

#[test]
fn a_lease_outlives_the_binding_for_the_same_guest_only() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
    let other = nwfilter::xml::read_binding("b.xml", &binding("tap0", "clean-traffic", OTHER, &[DHCP]));
    lab.host.enter(|| driver.create_binding(other.into_result()?).map_err(anyhow::Error::from))?;
    assert!(is_learning(&driver, "tap0")?);
    lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
    lab.bind(&driver, "tap0", "clean-traffic", &[DHCP])?;
    assert_eq!(addresses_of(&driver.binding_state(&port_dev("tap0"))?), ["10.0.0.2"]);
    Ok(())
}

#[test]
fn more_leases_than_a_filter_can_take_leave_the_first_in_force() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    let pairs = "<filter name='pairs' chain='arp'><rule action='accept' direction='out'>\
        <arp arpsrcipaddr='$IP' arpdstipaddr='$GATEWAY'/></rule></filter>";
    lab.host.enter(|| driver.define_filter("pairs.xml", pairs))?;
    lab.bind(&driver, "tap0", "pairs", &[DHCP, ("GATEWAY", "10.0.0.254")])?;
    exchange(&guest, &net, ADDRESS, 600)?;
    exchange(&guest, &net, SECOND, 600)?;
    let leases = lab.config().state_dir.join("nwfilter.leases");
    eventually("both are leased", || {
        Ok(fs::read_to_string(&leases).is_ok_and(|text| text.contains(" 10.0.0.3 ")))
    })?;
    has(&lab, &driver, "tap0", &["10.0.0.2"])?;
    assert_eq!(
        lab.host.enter(|| driver.diff())?.differences,
        [],
        "the guest cannot make its binding invalid"
    );
    Ok(())
}

#[test]
fn dhcpv6_leases_the_ipv6_address_where_only_that_is_missing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, net, driver } = ports()?;
    lab.bind(&driver, "tap0", "no-ipv6-spoofing", &[DHCP, ("DHCPSERVER", "fe80::1")])?;
    assert!(is_learning(&driver, "tap0")?);
    assert_eq!(lab.host.enter(|| driver.diff())?.differences, []);
    let (link, server): (Ipv6Addr, Ipv6Addr) = ("fe80::2".parse()?, "fe80::1".parse()?);
    let message = |kind: u8, address: &str, seconds: u32| -> Result<Vec<u8>> {
        let lease =
            [&address.parse::<Ipv6Addr>()?.octets()[..], &seconds.to_be_bytes(), &seconds.to_be_bytes()];
        let association = [&[0; 12][..], &[0, 5, 0, 24], &lease.concat()].concat();
        Ok([&[kind, 0, 0, 7, 0, 3, 0, association.len() as u8][..], &association].concat())
    };
    let from =
        |address, message: &[u8]| frames::udp(&Ends::v6(SERVER, address, GUEST, link), 547, 546, message);
    let (request, reply, release) = (3, 7, 8);
    let to_servers = Ends::v6(GUEST, link, Mac::new([0x33, 0x33, 0, 1, 0, 2]), "ff02::1:2".parse()?);
    let exchange = |from_server: Ipv6Addr, address, seconds| {
        guest.send(&frames::udp(&to_servers, 546, 547, &message(request, address, seconds)?))?;
        net.send(&from(from_server, &message(reply, address, seconds)?))
    };

    let solicit = frames::icmp(&Ends::v6(GUEST, link, SERVER, server), 135, 0, &[0; 20]);
    assert!(guest.delivers(&net, &solicit)?, "neighbour discovery passes");
    let packet = frames::udp(&Ends::v6(GUEST, link, SERVER, server), 1000, 2000, b"anything");
    assert!(!guest.delivers(&net, &packet)?, "nothing else does");
    assert!(net.delivers(&guest, &from(server, &message(2, "fd00::2", 60)?))?, "answers pass");
    net.send(&from(server, &message(reply, "fd00::66", 600)?))?;
    exchange("fe80::66".parse()?, "fd00::66", 600)?;
    exchange(server, "fd00::2", 600)?;
    has(&lab, &driver, "tap0", &["fd00::2"])?;
    exchange(server, "fd00::3", 600)?;
    has(&lab, &driver, "tap0", &["fd00::2", "fd00::3"])?;
    exchange(server, "fd00::2", 0)?;
    has(&lab, &driver, "tap0", &["fd00::3"])?;
    assert!(!lab.config().state_dir.join("nwfilter.leases").exists(), "libvirt could not read it");
    guest.send(&frames::udp(&to_servers, 546, 547, &message(release, "fd00::3", 0)?))?;
    eventually("released", || is_learning(&driver, "tap0"))
}

#[test]
fn a_server_on_the_host_itself_is_believed() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
    let Ports { lab, guest, driver, .. } = ports()?;
    lab.host.add_bridge_addr("10.0.0.254/24")?;
    lab.host.ip(&["route replace 255.255.255.255 dev br0"])?;
    let server = lab.host.enter(|| UdpSocket::bind("10.0.0.254:67"))?;
    server.set_broadcast(true)?;
    for params in [&[][..], &[DHCP, ("DHCPSERVER", "10.0.0.254")]] {
        lab.bind(&driver, "tap0", "clean-traffic", params)?;
        guest.send(&asked(&request(MessageType::Request, ADDRESS), GUEST))?;
        server.send_to(&bytes(&ack(GUEST, ADDRESS, 600)), "255.255.255.255:68")?;
        has(&lab, &driver, "tap0", &["10.0.0.2"]).with_context(|| format!("{params:?}"))?;
        lab.host.enter(|| driver.delete_binding(&port_dev("tap0")))?;
    }
    Ok(())
}

// ---- a real server and a real stack ----

/// A guest whose stack has no address, the server beside it, and a driver.
struct Network {
    lab: Lab,
    driver: Driver,
    guest: Guest,
    server: Guest,
    _dnsmasq: Process,
    _files: tempfile::TempDir,
}

impl Network {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let guest = lab.host.guest("vnet0", GUEST).start()?;
        let server = lab.host.guest("vnet1", SERVER).addr("10.0.0.1/24").start()?;
        let files = tempfile::tempdir()?;
        let dnsmasq = server.dhcp_server(files.path())?;
        // Without an address, the stack must not check where answers come from.
        for interface in ["all", "eth0"] {
            guest.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0")?;
        }
        let driver = lab.driver()?;
        Ok(Self { lab, driver, guest, server, _dnsmasq: dnsmasq, _files: files })
    }

    fn exchange(&self, message: &Message, expected: Option<MessageType>) -> Result<Option<Message>> {
        // Without an address, the stack needs to be told the way to everybody.
        self.guest.ip(&["route replace 255.255.255.255 dev eth0"])?;
        // A child that another test has just started may still have a copy of the last socket.
        let mut bound = None;
        eventually("the port of clients is free", || {
            bound = self.guest.enter(|| UdpSocket::bind("0.0.0.0:68")).ok();
            Ok(bound.is_some())
        })?;
        let socket = bound.context("it is bound")?;
        socket.set_broadcast(true)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            socket.send_to(&bytes(message), "255.255.255.255:67")?;
            let Some(expected) = expected else { return Ok(None) };
            let mut data = [0; 1500];
            while let Ok((length, _)) = socket.recv_from(&mut data) {
                let answer = Message::decode(&mut Decoder::new(&data[..length]))?;
                if answer.xid() == message.xid() && answer.opts().msg_type() == Some(expected) {
                    return Ok(Some(answer));
                }
            }
        }
        anyhow::bail!("no {expected:?}")
    }

    /// DISCOVER, OFFER, REQUEST, ACK; the stack then has the address.
    fn lease(&self, client: &[u8]) -> Result<Ipv4Addr> {
        let ask = |kind| {
            let mut message = dhcp(Opcode::BootRequest, kind, GUEST);
            message.set_flags(dhcproto::v4::Flags::default().set_broadcast());
            message.opts_mut().insert(DhcpOption::ClientIdentifier(client.to_vec()));
            message
        };
        let offer = self.exchange(&ask(MessageType::Discover), Some(MessageType::Offer))?.context("offer")?;
        let mut request = ask(MessageType::Request);
        request.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.yiaddr()));
        let server = offer.opts().get(OptionCode::ServerIdentifier).context("a server has a name")?;
        request.opts_mut().insert(server.clone());
        let ack = self.exchange(&request, Some(MessageType::Ack))?.context("ack")?;
        self.guest.ip(&[format!("addr replace {}/24 dev eth0", ack.yiaddr())])?;
        Ok(ack.yiaddr())
    }
}

#[test]
fn a_real_exchange_opens_the_port_for_the_leased_addresses_and_release_closes_it() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ebtables"),
        Need::Tool("dnsmasq"),
        Need::Tool("ping")
    );
    let network = Network::new()?;
    let Network { lab, driver, guest, server, .. } = &network;
    lab.bind(driver, "vnet0", "clean-traffic", &[DHCP, ("DHCPSERVER", "10.0.0.1")])?;
    guest.ip(&["addr add 10.0.0.9/24 dev eth0"])?;
    assert!(!guest.ping("10.0.0.1")?, "only DHCP passes");
    guest.ip(&["addr del 10.0.0.9/24 dev eth0"])?;

    let first = network.lease(b"one")?;
    has(lab, driver, "vnet0", &[&first.to_string()])?;
    assert!(server.ping(&first.to_string())?);
    ensure!(network.lease(b"one")? == first, "the server renews");
    let second = network.lease(b"two")?;
    has(lab, driver, "vnet0", &[&first.to_string(), &second.to_string()])?;
    assert!(server.ping(&second.to_string())?);

    network.exchange(&request(MessageType::Release, first), None)?;
    has(lab, driver, "vnet0", &[&second.to_string()])?;
    assert!(!server.ping(&first.to_string())?);
    assert!(server.ping(&second.to_string())?);
    Ok(())
}

#[test]
fn ftp_to_a_guest_that_got_its_address_by_dhcp_works_as_with_a_given_one() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ebtables"),
        Need::Tool("dnsmasq"),
        Need::Tool("vsftpd"),
        Need::Tool("curl"),
    );
    let network = Network::new()?;
    let Network { lab, driver, guest, server, .. } = &network;
    let seed = include_str!("../../../xml-fixtures/seed/ftp-by-port.xml");
    lab.host.enter(|| driver.define_filter("seed.xml", seed))?;
    lab.bind(driver, "vnet0", "ftp-by-port", &[])?;
    let address = network.lease(b"one")?.to_string();
    has(lab, driver, "vnet0", &[&address])?;

    let files = tempfile::tempdir()?;
    fs::write(files.path().join("file"), "some content")?;
    let _vsftpd = guest.vsftpd(files.path())?;
    let url = format!("ftp://{address}/file");
    let text = server.run(&["curl", "-sS", "--max-time", "10", "--ftp-port", "-", &url])?;
    assert_eq!(text, "some content");
    assert!(server.tcp_fetch(&format!("{address}:23"), Duration::from_millis(300)).is_err());
    Ok(())
}
