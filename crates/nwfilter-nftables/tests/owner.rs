//! A process that stays owns the table: a flush of all rules does not touch it, others change it by asking, and when the
//! owner is gone its rules stay.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_nftables::kernel::{Connection, Operation, Place, TableFlags, TableId, Transaction};
use nwfilter_rules::{
    Applied, ApplyError, Backend, Batch, EthernetSide, EthernetTest, Match, Rule, Ruleset, Verdict,
};
use nwfilter_testlab::stream::{Stream, while_streaming};
use nwfilter_testlab::{Host, Mac, Need, Tap, frames, skip_unless};
use tempfile::TempDir;

const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);

/// The address of nobody: the bridge forwards what comes from it.
const STRANGER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x0a]);

/// Whether the kernel keeps an owned table when its owner is gone (Linux 6.9).
fn persists() -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

struct Lab {
    host: Host,
    guest: Tap,
    peer: Tap,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new().unwrap();
        let [guest, peer] = ["tap0", "tap1"].map(|name| host.tap(name).unwrap());
        Self { host, guest, peer, dir: tempfile::tempdir().unwrap() }
    }

    fn owner(&self) -> Nftables {
        Nftables::new().owning(self.dir.path())
    }

    fn asking(&self) -> Nftables {
        Nftables::new().beside(self.dir.path())
    }

    fn apply(&self, backend: &Nftables, batch: &Batch) -> Result<Applied, ApplyError> {
        self.host.enter(|| backend.apply(batch))
    }

    fn differences(&self, backend: &Nftables, batch: &Batch) -> usize {
        self.host.enter(|| backend.plan(batch)).unwrap().differences.len()
    }

    fn flush(&self) {
        self.host.run(&["nft", "flush", "ruleset"]).unwrap();
    }

    fn table(&self) -> String {
        self.host.run(&["nft", "list", "tables"]).unwrap()
    }

    /// Drops an owner, and waits until the kernel sees that it is gone: a process that another test forks has the socket, too,
    /// until it executes its program.
    fn end(&self, owner: Nftables) {
        drop(owner);
        let table = TableId::bridge("nwfilter".parse().unwrap());
        let is_owned = || {
            let table = self.host.enter(|| Connection::open().unwrap().table(&table)).unwrap();
            table.is_some_and(|table| table.owner.is_some())
        };
        until(|| !is_owned());
    }

    fn is_filtered(&self) -> bool {
        let frame = |from| frames::ethernet(from, PEER, 0x88b5, b"data");
        assert!(self.guest.delivers(&self.peer, &frame(GUEST)).unwrap());
        !self.guest.delivers(&self.peer, &frame(STRANGER)).unwrap()
    }
}

/// Waits for what the kernel does not tell of.
fn until(happened: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !happened() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::yield_now();
    }
}

/// What lets a port send frames of one address only.
fn own_mac(mac: Mac) -> Arc<Ruleset> {
    let mac: nwfilter_xml::MacAddr = mac.to_string().parse().unwrap();
    let drop = Rule::built_in([Match::is_not(EthernetTest::SrcMac(mac.into()))], Verdict::Drop);
    let mut ruleset = Ruleset::default();
    ruleset.ethernet.from_guest = Some(EthernetSide::of_rules([drop]));
    Arc::new(ruleset)
}

fn batch(ports: &[(&str, Arc<Ruleset>)]) -> Batch {
    let mut batch = Batch::default();
    ports.iter().for_each(|(port, ruleset)| batch.filter(port.parse().unwrap(), ruleset.clone()));
    batch
}

fn guest() -> Batch {
    batch(&[("tap0", own_mac(GUEST))])
}

fn socket(directory: &Path) -> std::path::PathBuf {
    directory.join(".nftables-owner")
}

#[test]
fn a_table_that_another_program_made_dormant_is_a_difference_and_filters_again() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let backend = Nftables::new();
    lab.apply(&backend, &guest()).unwrap();
    assert!(lab.is_filtered());
    lab.host.run(&["nft", "add table bridge nwfilter { flags dormant; }"]).unwrap();
    assert!(!lab.is_filtered());
    let differences = lab.host.enter(|| backend.plan(&guest())).unwrap().differences;
    let shown: Vec<_> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["+ host bridge nwfilter flags dormant"]);
    lab.apply(&backend, &guest()).unwrap();
    assert!(lab.is_filtered());
    assert_eq!(lab.differences(&Nftables::new(), &guest()), 0);
}

#[test]
fn a_flush_of_all_rules_does_not_touch_a_table_that_has_an_owner() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let owner = lab.owner();
    lab.apply(&owner, &guest()).unwrap();
    lab.flush();
    assert_eq!(lab.is_filtered(), persists(), "{}", lab.table());
    // Without an owner it is a table as any other.
    lab.end(owner);
    lab.flush();
    assert_eq!(lab.table(), "");
}

#[test]
fn a_table_is_owned_only_where_it_outlives_its_owner() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    // The fact: without `persist` the rules go with the process.
    lab.host.enter(|| {
        let mut transaction = Transaction::new();
        let flags = TableFlags { owner: true, ..TableFlags::default() };
        let table = TableId::bridge("nwfilter-probe".parse().unwrap());
        transaction.push(Operation::AddTable { table, flags }, ());
        let mut connection = Connection::open().unwrap();
        connection.commit(&transaction, None).unwrap();
        assert!(lab.table().contains("nwfilter-probe"));
        drop(connection);
        until(|| lab.table().is_empty());
    });
    let owner = lab.owner();
    lab.apply(&owner, &guest()).unwrap();
    assert_eq!(socket(lab.dir.path()).exists(), persists());
    lab.end(owner);
    assert!(lab.is_filtered());
    assert!(!socket(lab.dir.path()).exists());
}

#[test]
fn a_process_changes_an_owned_table_by_asking_its_owner() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let (owner, other) = (lab.owner(), lab.asking());
    lab.apply(&owner, &guest()).unwrap();
    let mut watch = lab.host.enter(|| owner.watch()).unwrap().unwrap();

    let both = batch(&[("tap0", own_mac(PEER)), ("tap1", own_mac(PEER))]);
    let applied = lab.apply(&other, &both).unwrap();
    assert_eq!((applied.changed.len(), applied.commits), (2, 1));
    assert_eq!(lab.apply(&other, &both).unwrap().commits, 0);
    assert_eq!((lab.differences(&owner, &both), lab.differences(&other, &both)), (0, 0));
    // Whoever keeps the ports as they should be hears who changed them.
    let changes = lab.host.enter(|| watch.changes()).unwrap();
    if persists() {
        let by: Vec<_> = changes.iter().map(|change| change.by.as_ref().unwrap().id).collect();
        assert_eq!(by, [std::process::id()]);
    }

    // Each goes on from what the other one left.
    let mut gone = guest();
    gone.remove("tap1".parse().unwrap());
    assert_eq!(lab.apply(&owner, &gone).unwrap().commits, 1);
    assert_eq!(lab.differences(&other, &gone), 0);
    assert!(lab.is_filtered());
    let cleared = lab.host.enter(|| other.clear()).unwrap();
    assert_eq!((cleared.changed.len(), lab.table().as_str()), (1, ""));
    lab.apply(&owner, &guest()).unwrap();
    lab.flush();
    assert_eq!(lab.is_filtered(), persists());
}

#[test]
fn the_table_of_the_hosts_connections_is_owned_and_changed_as_the_other() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let (owner, other) = (lab.owner(), lab.asking());
    // A guest's FTP server, as a process left it that did not own the table.
    let left = "table inet nwfilter {
        set host-ftp-tcp-ipv4 { type ipv4_addr . inet_service; elements = { 10.0.0.2 . 21 }; }
        set host-ftp-tcp-ipv4-ports { type ifname . ipv4_addr . inet_service; elements = { tap9 . 10.0.0.2 . 21 }; }
    }";
    lab.host.run(&["nft", left]).unwrap();
    lab.apply(&owner, &guest()).unwrap();
    lab.flush();
    if !persists() {
        assert_eq!(lab.table(), "");
    } else {
        assert!(
            ["bridge", "inet"].iter().all(|family| lab.table().contains(&format!("table {family} nwfilter")))
        );
        let chain = lab.host.run(&["nft", "list", "chain", "inet", "nwfilter", "host-output"]).unwrap();
        assert!(chain.contains("@host-ftp-tcp-ipv4 ct helper set \"host-ftp-tcp\""), "{chain}");
    }
    let mut gone = guest();
    gone.remove("tap9".parse().unwrap());
    lab.apply(&other, &gone).unwrap();
    assert_eq!(lab.table(), "table bridge nwfilter\n");
    assert!(lab.is_filtered());
}

#[test]
fn a_process_that_cannot_find_the_owners_socket_is_refused_with_advice() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    if !persists() {
        return eprintln!("nothing to see: this kernel's tables are not owned");
    }
    let (lab, elsewhere) = (Lab::new(), tempfile::tempdir().unwrap());
    let owner = lab.owner();
    lab.apply(&owner, &guest()).unwrap();
    let both = batch(&[("tap1", own_mac(PEER))]);
    for other in [Nftables::new(), Nftables::new().beside(elsewhere.path())] {
        let refused = lab.apply(&other, &both).unwrap_err().to_string();
        assert!(refused.starts_with("table bridge nwfilter: another process owns it"), "{refused}");
        assert!(refused.ends_with("use the state directory of that process, or end it"), "{refused}");
        assert_eq!(lab.differences(&owner, &guest()), 0);
    }
}

#[test]
fn the_rules_of_an_owner_that_is_gone_stay_and_the_next_owner_claims_them() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let (owner, other) = (lab.owner(), lab.asking());
    lab.apply(&owner, &guest()).unwrap();
    assert_eq!(lab.differences(&other, &guest()), 0);
    drop(owner);
    assert!(lab.is_filtered());
    // Whoever asked before goes on alone, although the kernel does not tell that the owner is gone.
    let both = batch(&[("tap0", own_mac(GUEST)), ("tap1", own_mac(PEER))]);
    assert_eq!(lab.apply(&other, &both).unwrap().commits, 1);

    let next = lab.owner();
    assert_eq!(lab.apply(&next, &both).unwrap().changed.len(), 0);
    lab.flush();
    assert_eq!(lab.is_filtered(), persists());
    // And asks again.
    assert_eq!(lab.apply(&other, &guest()).unwrap().changed.len(), usize::from(!persists()));
    let mut gone = Batch::default();
    gone.remove("tap1".parse().unwrap());
    lab.apply(&other, &gone).unwrap();
    assert_eq!(lab.differences(&next, &gone), 0);
}

#[test]
fn a_second_process_asks_the_owner_and_takes_over_when_it_ends() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let (first, second) = (lab.owner(), lab.owner());
    lab.apply(&first, &guest()).unwrap();
    let both = batch(&[("tap0", own_mac(GUEST)), ("tap1", own_mac(PEER))]);
    lab.apply(&second, &both).unwrap();
    assert_eq!(lab.differences(&first, &both), 0);
    lab.end(first);
    lab.apply(&second, &guest()).unwrap();
    lab.flush();
    assert_eq!(lab.is_filtered(), persists());
    lab.apply(&lab.asking(), &both).unwrap();
    assert_eq!(lab.differences(&second, &both), 0);
}

#[test]
fn no_frame_slips_through_while_a_table_that_nobody_owned_gets_an_owner() {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    let lab = Lab::new();
    let numbered = |number: u32| frames::ethernet(GUEST, PEER, 0x88b5, &number.to_be_bytes());
    let streams = [Stream {
        from: &lab.guest,
        to: &lab.peer,
        allowed: Box::new(numbered),
        forbidden: vec![frames::ethernet(PEER, PEER, 0x88b5, b"spoofed")],
        rest: Duration::ZERO,
    }];
    // Nobody owned it: it is made again.
    lab.apply(&lab.asking(), &guest()).unwrap();
    let tally = while_streaming(&streams, |streaming| {
        for _ in 0..20 {
            let owner = lab.owner();
            assert_eq!(lab.apply(&owner, &guest())?.changed.len(), 0);
            lab.end(owner);
            // As one that nobody ever owned.
            lab.host.enter(unowned);
        }
        streaming.take()
    })
    .unwrap();
    eprintln!("{tally:?}");
    assert!(tally.allowed > 0 && tally.forbidden > 0);
    // A frame that is among the old rules when they go may be lost, but none gets through.
    assert_eq!(tally.leaked, 0, "{tally:?}");
}

/// Makes the table again without flags, as nft would do it from a listing.
fn unowned() {
    let table = TableId::bridge("nwfilter".parse().unwrap());
    let mut connection = Connection::open().unwrap();
    let installed = connection.table(&table).unwrap().unwrap();
    let mut transaction = Transaction::new();
    transaction.push(Operation::DeleteTable { table: table.clone() }, ());
    transaction.push(Operation::AddTable { table: table.clone(), flags: TableFlags::default() }, ());
    for set in installed.sets.values() {
        transaction.push(Operation::AddSet { table: table.clone(), set: set.set.clone().into() }, ());
    }
    for chain in installed.chains.values() {
        transaction.push(Operation::AddChain { table: table.clone(), chain: chain.chain.clone() }, ());
    }
    for (name, chain) in &installed.chains {
        for rule in &chain.rules {
            let place = Place::End;
            let (table, chain, rule) = (table.clone(), name.clone(), rule.rule.clone());
            transaction.push(Operation::AddRule { table, chain, place, rule }, ());
        }
    }
    for set in installed.sets.values() {
        let elements: Vec<_> = set.elements.iter().map(|element| element.element.clone()).collect();
        if !elements.is_empty() {
            let (table, set) = (table.clone(), set.set.clone().into());
            transaction.push(Operation::AddElements { table, set, elements }, ());
        }
    }
    connection.commit(&transaction, None).unwrap();
}

#[test]
fn nonsense_or_silence_on_the_owners_socket_changes_nothing_and_blocks_nobody() {
    use std::io::{Read, Write};
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    if !persists() {
        return eprintln!("nothing to see: this kernel's tables are not owned");
    }
    let lab = Lab::new();
    let (owner, other) = (lab.owner(), lab.asking());
    lab.apply(&owner, &guest()).unwrap();
    let path = socket(lab.dir.path());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(UnixStream::connect(&path).unwrap());
    for (bytes, expected) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "another version of this protocol"),
        (&[b"NWF\x01".as_slice(), &[0; 16], &u32::MAX.to_ne_bytes()].concat(), "is longer than"),
        (
            &[b"NWF\x01".as_slice(), &[0; 16], &4u32.to_ne_bytes(), b"what"].concat(),
            "another network namespace",
        ),
    ] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // What it did not read makes the end of the stream an error.
        let _ = client.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(expected), "{answer}");
    }
    assert_eq!(lab.differences(&owner, &guest()), 0);
    lab.apply(&other, &batch(&[("tap1", own_mac(PEER))])).unwrap();
}
