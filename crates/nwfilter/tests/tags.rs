//! Sets with tags on a real kernel: they hold the addresses of ports that come, go, learn and change their tags.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod learn_support;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::Result;
use learn_support::{SOON, binding};
use nwfilter::rules::SetContent;
use nwfilter::xml::{SetFamily, SetRange, read_binding};
use nwfilter::{Backend, BindingState, Config, Driver, Event};
use nwfilter_nftables::Nftables;
use nwfilter_testlab::{Host, Mac, Need, Tap, frames, port_dev, skip_unless};
use nwfilter_xtables::Xtables;

const TAGS: [&str; 3] = ["web", "db", "front"];
const SETS: [(&str, &str); 2] = [
    ("web", "<tag name='web'/>"),
    ("all", "<include set='web'/><tag name='db'/><entry value='10.7.0.0/16'/>"),
];

struct Lab {
    host: Host,
    driver: Driver,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(backend: impl Backend + 'static) -> Result<Self> {
        let (host, dir) = (Host::new()?, tempfile::tempdir()?);
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        let driver = Driver::open(config, backend)?;
        let lab = Self { host, driver, _dir: dir };
        for (name, members) in SETS {
            let text = format!("<filterset name='{name}' family='ipv4'>{members}</filterset>");
            lab.host.enter(|| lab.driver.define_set("s.xml", &text))?;
        }
        // Without rules on connections, which not every kernel tracks in bridges.
        let filter = "<filter name='f'><rule action='accept' direction='out' statematch='false'><all srcipaddr='$IP'/></rule>
            <rule action='accept' direction='in' statematch='false'><all ipset='all' ipsetflags='src'/></rule></filter>";
        lab.host.enter(|| lab.driver.define_filter("f.xml", filter))?;
        Ok(lab)
    }

    /// Binds a port, anew if it is bound. Without an address it is learned.
    fn bind(&self, port: &str, mac: Mac, tags: &str, address: Option<Ipv4Addr>) -> Result<()> {
        let address = address.map(|address| address.to_string());
        let mut parameters = vec![];
        parameters.extend((!tags.is_empty()).then_some(("CTRL_TAGS", tags)));
        parameters.extend(address.iter().map(|address| ("IP", address.as_str())));
        let binding = read_binding("b.xml", &binding(port, "f", mac, &parameters)).into_result()?;
        self.host.enter(|| self.driver.replace_binding(binding))?;
        Ok(())
    }

    /// Has a guest say its address, and waits until that is in force.
    fn learn(&self, guest: &Tap, mac: Mac, address: Ipv4Addr) -> Result<()> {
        let events = self.driver.subscribe();
        guest.send(&frames::arp(mac, Mac::BROADCAST, frames::Arp::gratuitous(mac, address)))?;
        while !matches!(events.recv_timeout(SOON)?, Event::AddressChanged { port, .. } if port.as_str() == guest.name())
        {
        }
        assert!(self.has_learned(guest.name(), address)?);
        Ok(())
    }

    fn has_learned(&self, port: &str, address: Ipv4Addr) -> Result<bool> {
        Ok(match self.driver.binding_state(&port_dev(port))? {
            BindingState::Learned { addresses, .. } => addresses == [address],
            _ => false,
        })
    }

    fn unbind(&self, port: &str) -> Result<()> {
        self.host.enter(|| self.driver.delete_binding(&port_dev(port)))?;
        Ok(())
    }

    /// What the kernel has in a set, as its tool says.
    fn kernel(&self, set: &str) -> Result<SetContent> {
        let texts: Vec<String> = if self.driver.backend_name() == "nftables" {
            let text = self.host.run(&["nft", "list", "set", "bridge", "nwfilter", &format!("set-{set}")])?;
            let elements =
                text.split_once("elements = {").map_or("", |(_, rest)| rest.split('}').next().unwrap());
            elements.split(',').map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect()
        } else {
            let name = format!("nwfilter-{set}");
            let text = self.host.run(&["ipset", "save", &name])?;
            let begin = format!("add {name} ");
            text.lines().filter_map(|line| Some(line.strip_prefix(&begin)?.trim().to_owned())).collect()
        };
        Ok(content(texts.iter().map(String::as_str)))
    }
}

fn content<'a>(texts: impl Iterator<Item = &'a str>) -> SetContent {
    SetContent::of(SetFamily::Ipv4, texts.map(|text| SetRange::parse(SetFamily::Ipv4, text).unwrap()))
}

fn a_guest_becomes_a_member_when_its_address_is_learned(backend: impl Backend + 'static) -> Result<()> {
    let lab = Lab::new(backend)?;
    let (guest, mac, address) =
        (lab.host.tap("tap0")?, Mac::new([0x52, 0x54, 0, 0, 0, 1]), Ipv4Addr::new(10, 0, 0, 2));
    lab.bind("tap0", mac, "web", None)?;
    assert_eq!(lab.kernel("web")?, content([].into_iter()));
    lab.learn(&guest, mac, address)?;
    assert_eq!(lab.kernel("web")?, content(["10.0.0.2"].into_iter()));
    assert_eq!(lab.kernel("all")?, content(["10.0.0.2", "10.7.0.0/16"].into_iter()));
    // Another tag is no reason to learn the address again.
    lab.bind("tap0", mac, "db", None)?;
    assert!(lab.has_learned("tap0", address)?);
    assert_eq!(lab.kernel("web")?, content([].into_iter()));
    assert_eq!(lab.kernel("all")?, content(["10.0.0.2", "10.7.0.0/16"].into_iter()));
    lab.unbind("tap0")?;
    assert_eq!(lab.kernel("all")?, content(["10.7.0.0/16"].into_iter()));
    Ok(())
}

#[test]
fn a_guest_becomes_a_member_of_an_ipset_when_its_address_is_learned() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Tool("ebtables"));
    a_guest_becomes_a_member_when_its_address_is_learned(Xtables::default())
}

#[test]
fn a_guest_becomes_a_member_of_a_set_of_nftables_when_its_address_is_learned() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    a_guest_becomes_a_member_when_its_address_is_learned(Nftables::new())
}

/// Numbers that look random, and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Fifty ports come, go, learn and change their tags at random.
fn the_kernel_follows_fifty_ports(backend: impl Backend + 'static, steps: usize) -> Result<()> {
    const PORTS: u64 = 50;
    let lab = Lab::new(backend)?;
    let taps: Vec<_> = (0..PORTS).map(|port| lab.host.tap(&format!("tap{port}"))).collect::<Result<_>>()?;
    let mut model: BTreeMap<u64, (String, Option<Ipv4Addr>)> = BTreeMap::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for step in 0..steps {
        let port = numbers.below(PORTS);
        let (name, mac) = (format!("tap{port}"), Mac::new([0x52, 0x54, 0, 0, 1, port as u8]));
        let address = Ipv4Addr::new(10, 0, numbers.below(2) as u8, numbers.below(250) as u8 + 1);
        let tags: Vec<_> = TAGS.into_iter().filter(|_| numbers.below(2) == 0).collect();
        let tags = tags.join(":");
        match (numbers.below(4), model.get(&port)) {
            (0, Some(_)) => {
                lab.unbind(&name)?;
                model.remove(&port);
            }
            (1, Some((old, _))) if *old != tags => {
                // Nothing but tags changes for a port whose address is learned.
                let known = model[&port].1.filter(|address| !lab.has_learned(&name, *address).unwrap());
                lab.bind(&name, mac, &tags, known)?;
                model.get_mut(&port).unwrap().0 = tags;
            }
            (1 | 2, _) => {
                if model.remove(&port).is_some() {
                    lab.unbind(&name)?;
                }
                lab.bind(&name, mac, &tags, None)?;
                lab.learn(&taps[port as usize], mac, address)?;
                model.insert(port, (tags, Some(address)));
            }
            _ => {
                lab.bind(&name, mac, &tags, Some(address))?;
                model.insert(port, (tags, Some(address)));
            }
        }
        let of = |tag: &str| {
            let ports = model.values().filter(|(tags, _)| tags.split(':').any(|has| has == tag));
            ports.filter_map(|(_, address)| Some((*address)?.to_string())).collect::<Vec<_>>()
        };
        let (web, db) = (of("web"), of("db"));
        let all = web.iter().chain(&db).map(String::as_str).chain(["10.7.0.0/16"]);
        assert_eq!(lab.kernel("all")?, content(all), "step {step}");
        assert_eq!(lab.kernel("web")?, content(web.iter().map(String::as_str)), "step {step}");
    }
    assert!(model.len() > 10, "hardly any port was bound");
    Ok(())
}

#[test]
fn an_ipset_equals_the_model_after_each_of_many_random_steps() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Tool("ebtables"));
    the_kernel_follows_fifty_ports(Xtables::default(), 60)
}

#[test]
fn a_set_of_nftables_equals_the_model_after_each_of_many_random_steps() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    the_kernel_follows_fifty_ports(Nftables::new(), 200)
}
