//! A thousand ports learn at once, one of them flooded, on one thread. Alone in its binary: it measures the process.

#![allow(clippy::unwrap_used)] // The lint does not see that the helpers are tests.

mod learn_support;

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use learn_support::*;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, send, socket,
};
use nwfilter::xml::{PortDev, read_binding};
use nwfilter::{Backend, Driver, Fake};
use nwfilter_testlab::{Mac, Need, skip_unless};

const PORTS: usize = 1000;
/// Frames of one port that are more than it may have read at once.
const FLOOD: u64 = 1000;

/// Whether a port's rules name its guest's address.
fn is_filtered(fake: &Fake, port: &PortDev) -> bool {
    let ruleset = fake.ruleset(port);
    let from_guest = ruleset.as_ref().and_then(|ruleset| ruleset.ethernet.from_guest.as_ref());
    from_guest.is_some_and(|side| !side.chains.is_empty())
}

/// How many ports' rules do.
fn filtered(fake: &Fake) -> usize {
    let installed = fake.installed().unwrap().ports;
    installed.iter().filter(|port| is_filtered(fake, port)).count()
}

/// A field of this process's status.
fn status(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim_start_matches(':').split_whitespace().next().context("empty")?.parse()?)
}

/// The time that the learning thread has worked.
fn learner_time() -> Result<Duration> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.trim() == "nwfilter-learn" {
            let text = fs::read_to_string(task.join("schedstat"))?;
            return Ok(Duration::from_nanos(text.split(' ').next().context("empty")?.parse()?));
        }
    }
    anyhow::bail!("no thread learns")
}

fn mac(number: usize) -> Mac {
    let [high, low] = (number as u16).to_be_bytes();
    Mac::new([0x52, 0x54, 0, 1, high, low])
}

fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 1, 0, 0).to_bits() + number as u32 + 1)
}

/// Pairs of connected interfaces, none in a bridge: what the learner hears is what is sent into the other end.
fn make_ports(lab: &Lab) -> Result<()> {
    let commands: Vec<_> = (0..PORTS)
        .flat_map(|number| {
            [
                format!("link add p{number} type veth peer name g{number}"),
                format!("link set p{number} up"),
                format!("link set g{number} up"),
            ]
        })
        .collect();
    lab.host.ip(&commands)
}

#[test]
fn a_thousand_ports_learn_while_one_is_flooded() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 1 << 13, 1 << 13)?;
    let lab = Lab::new()?;
    make_ports(&lab)?;
    let fake = Fake::new();
    let driver = Driver::open(lab.config(), fake.clone())?;

    // All bindings are there before the learner is: a restart.
    fs::create_dir_all(lab.config().state_dir)?;
    for number in 0..PORTS {
        let text = binding(&format!("p{number}"), "clean-traffic", mac(number), &[]);
        let binding = read_binding("b.xml", &text).into_result()?;
        let stored = nwfilter::xml::write_binding_status(&binding);
        fs::write(lab.config().state_dir.join(format!("p{number}.xml")), stored)?;
    }
    driver.bindings()?;
    driver.port_statuses()?;
    let (memory, threads) = (status("VmRSS")?, status("Threads")?);
    lab.host.enter(|| driver.reload())?;
    assert_eq!(driver.port_statuses()?.len(), PORTS);

    let listens = || {
        let sockets = lab.host.enter(|| fs::read_to_string("/proc/thread-self/net/packet"))?;
        // The first line is a heading.
        Ok(sockets.lines().count() == 1 + PORTS)
    };
    patiently("the thread listens on all ports", listens)?;
    let worked = learner_time()?;

    let flood = Sender::new(&lab, PORTS - 1)?;
    let senders = (0..PORTS - 1).map(|number| Sender::new(&lab, number)).collect::<Result<Vec<_>>>()?;
    let (stop, flooded) = (AtomicBool::new(false), AtomicU64::new(0));
    let (sent, learned) = std::thread::scope(|scope| -> Result<_> {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // It teaches nothing, and the kernel filter lets it through: an address nobody can have.
                let sent = flood.send(&packet(mac(PORTS - 1), [127, 0, 0, 1].into())).is_ok();
                flooded.fetch_add(u64::from(sent), Ordering::Relaxed);
            }
        });
        let learn = || {
            let is_flooded = || Ok(flooded.load(Ordering::Relaxed) > FLOOD);
            patiently("the flood is more than the port may send", is_flooded)?;
            let start = Instant::now();
            for (number, sender) in senders.iter().enumerate() {
                sender.send(&packet(mac(number), address(number)))?;
            }
            let sent = start.elapsed();
            patiently("all have learned", || Ok(filtered(&fake) == PORTS - 1))
                .with_context(|| format!("{} of {PORTS}", filtered(&fake)))?;
            Ok((sent, start.elapsed()))
        };
        let learned = learn();
        stop.store(true, Ordering::Relaxed);
        learned
    })?;
    let worked = learner_time()?.saturating_sub(worked);
    let more = status("VmHWM")?.saturating_sub(memory);
    println!(
        "{PORTS} ports learned in {learned:?}, sent within {sent:?}, beside {flooded:?} frames of a flood; \
         {worked:?} of the thread's work; {more} KiB more memory"
    );
    assert!(more < 32 * 1024, "{more} KiB");
    // The scope ends a little before the kernel has seen the last of the thread that flooded.
    eventually("one thread learns for all ports", || Ok(status("Threads")? == threads + 1))?;

    // The flooded port learns too, once it says something of worth.
    eventually("the flooded port has learned", || {
        flood.send(&packet(mac(PORTS - 1), address(PORTS - 1)))?;
        Ok(filtered(&fake) == PORTS)
    })
}

/// A socket that sends frames from the guest's end of a pair.
struct Sender {
    socket: OwnedFd,
}

impl Sender {
    fn new(lab: &Lab, number: usize) -> Result<Self> {
        let name = format!("g{number}");
        lab.host.enter(|| {
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
            let index = nix::net::if_::if_nametoindex(name.as_str())?;
            let address = nix::libc::sockaddr_ll {
                sll_family: nix::libc::AF_PACKET as u16,
                sll_protocol: 0,
                sll_ifindex: index.cast_signed(),
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            let length = size_of_val(&address) as nix::libc::socklen_t;
            // SAFETY: the pointer and length are those of an address of the family that it names.
            let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) };
            bind(socket.as_raw_fd(), &address.context("a link address")?)?;
            Ok(Self { socket })
        })
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }
}
