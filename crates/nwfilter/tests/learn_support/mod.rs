//! What the tests of learning share: a host with a driver, DHCP messages, and waiting.
#![allow(dead_code)] // Each test binary uses a part.
#![allow(clippy::unwrap_used)] // The lint does not see that these are tests.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dhcproto::v4::{DhcpOption, HType, Message, MessageType, Opcode};
use dhcproto::{Encodable, Encoder};
use nwfilter::xml::read_binding;
use nwfilter::{BindingState, Clock, Config, Driver};
use nwfilter_testlab::{Ends, Host, Mac, Saved, Tap, frames, port_dev};
use nwfilter_xtables::Xtables;
use tempfile::TempDir;

pub(crate) const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
pub(crate) const OTHER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x99]);
pub(crate) const SERVER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0xfe]);
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub(crate) const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(crate) const SOON: Duration = Duration::from_secs(5);

/// Directories of a driver, in a host.
pub(crate) struct Lab {
    pub(crate) host: Host,
    pub(crate) dir: TempDir,
    /// The clock of all drivers. It stands still.
    pub(crate) clock: Clock,
}

impl Lab {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { host: Host::new()?, dir: tempfile::tempdir()?, clock: Clock::standing() })
    }

    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(self.dir.path().join("filters"), self.dir.path().join("state"));
        config.clock = self.clock.clone();
        config
    }

    /// Lets a time pass at once, and has the learner of the guest at a tap notice.
    pub(crate) fn pass(&self, time: Duration, guest: &Tap) -> Result<()> {
        self.clock.advance(time);
        guest.send(&asked(&dhcp(Opcode::BootRequest, MessageType::Discover, GUEST), GUEST))
    }

    /// A driver that leaves learning to others.
    pub(crate) fn passive_driver(&self) -> Result<Driver> {
        Ok(Driver::builder().config(self.config()).without_learner().open(Xtables::default())?)
    }

    /// A driver whose threads and tools act in the host.
    pub(crate) fn driver(&self) -> Result<Driver> {
        Ok(Driver::open(self.config(), Xtables::default())?)
    }

    pub(crate) fn bind(
        &self,
        driver: &Driver,
        port: &str,
        filter: &str,
        params: &[(&str, &str)],
    ) -> Result<()> {
        let text = binding(port, filter, GUEST, params);
        let binding = read_binding("binding.xml", &text).into_result()?;
        self.host.enter(|| driver.create_binding(binding))?;
        Ok(())
    }

    pub(crate) fn rules(&self, port: &str) -> Result<Saved> {
        Ok(self.host.saved()?.port(port))
    }
}

pub(crate) fn binding(port: &str, filter: &str, mac: Mac, params: &[(&str, &str)]) -> String {
    let params: String =
        params.iter().map(|(name, value)| format!("<parameter name='{name}' value='{value}'/>")).collect();
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='{port}'/><mac address='{mac}'/><filterref filter='{filter}'>{params}</filterref>\
         </filterbinding>"
    )
}

/// Waits until something holds, as long as our own code may take.
pub(crate) fn eventually(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    within(SOON, what, holds)
}

/// Waits until something holds, as long as libvirt may take on a busy machine.
pub(crate) fn patiently(what: &str, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    within(Duration::from_secs(60), what, holds)
}

fn within(limit: Duration, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("after {limit:?} still not: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until a port has learned or leased exactly these addresses and the kernel has its rules.
pub(crate) fn has(lab: &Lab, driver: &Driver, port: &str, addresses: &[&str]) -> Result<()> {
    let holds = eventually("has them", || {
        let known = addresses_of(&driver.binding_state(&port_dev(port))?) == addresses;
        Ok(known && lab.host.enter(|| driver.diff())?.is_empty())
    });
    let state = driver.binding_state(&port_dev(port))?;
    holds.with_context(|| format!("{port} should have {addresses:?}, but: {state}"))
}

pub(crate) fn addresses_of(state: &BindingState) -> Vec<String> {
    match state {
        BindingState::Learned { addresses, .. } => addresses.iter().map(ToString::to_string).collect(),
        BindingState::Leased { leases } => leases.iter().map(|lease| lease.address.to_string()).collect(),
        _ => Vec::new(),
    }
}

pub(crate) fn is_learning(driver: &Driver, port: &str) -> Result<bool> {
    Ok(matches!(driver.binding_state(&port_dev(port))?, BindingState::Learning { .. }))
}

/// A message of a DHCP server or client about a hardware address.
pub(crate) fn dhcp(opcode: Opcode, kind: MessageType, mac: Mac) -> Message {
    let nowhere = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(7, nowhere, nowhere, nowhere, nowhere, &mac.octets());
    message.set_opcode(opcode).set_htype(HType::Eth);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    message
}

pub(crate) fn ack(mac: Mac, address: Ipv4Addr, seconds: u32) -> Message {
    let mut message = dhcp(Opcode::BootReply, MessageType::Ack, mac);
    message.set_yiaddr(address);
    message.opts_mut().insert(DhcpOption::AddressLeaseTime(seconds));
    message.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER_ADDRESS));
    message
}

pub(crate) fn request(kind: MessageType, address: Ipv4Addr) -> Message {
    let mut message = dhcp(Opcode::BootRequest, kind, GUEST);
    match kind {
        MessageType::Release => message.set_ciaddr(address),
        _ => {
            message.opts_mut().insert(DhcpOption::RequestedIpAddress(address));
            &mut message
        }
    };
    message
}

pub(crate) fn bytes(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    bytes.resize(bytes.len().max(300), 0);
    bytes
}

/// The frame of a server's answer.
pub(crate) fn answer(message: &Message) -> Vec<u8> {
    answer_from(message, SERVER, SERVER_ADDRESS, GUEST)
}

pub(crate) fn answer_from(message: &Message, mac: Mac, address: Ipv4Addr, to: Mac) -> Vec<u8> {
    frames::udp(&Ends::v4(mac, address, to, Ipv4Addr::BROADCAST), 67, 68, &bytes(message))
}

/// The frame of a guest's request.
pub(crate) fn asked(message: &Message, mac: Mac) -> Vec<u8> {
    let ends = Ends::v4(mac, Ipv4Addr::UNSPECIFIED, Mac::BROADCAST, Ipv4Addr::BROADCAST);
    frames::udp(&ends, 68, 67, &bytes(message))
}

/// Has the guest at a tap ask for an address, and a server at another grant it.
pub(crate) fn exchange(guest: &Tap, net: &Tap, address: Ipv4Addr, seconds: u32) -> Result<()> {
    guest.send(&asked(&request(MessageType::Request, address), GUEST))?;
    net.send(&answer(&ack(GUEST, address, seconds)))
}

/// An ordinary packet of the guest.
pub(crate) fn packet(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    frames::udp(&Ends::v4(mac, address, SERVER, SERVER_ADDRESS), 1000, 2000, b"anything")
}
