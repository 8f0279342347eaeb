//! The kernel layer with the real kernel: what is refused, what is read back, who is told.

#![allow(clippy::unwrap_used, reason = "what is unwrapped here are names that are right")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use nwfilter_nftables::kernel::{
    Chain, CommitError, Connection, Datatype, Element, ElementKey, Event, Expr, Monitor, Operation, Part,
    Place, Rule, Set, SetName, TableFlags, TableId, Transaction, expr::Verdict, field,
};
use nwfilter_testlab::{Host, Need, skip_unless};

fn table() -> TableId {
    TableId::bridge("t".parse().unwrap())
}

fn add_table(table: TableId) -> Operation {
    Operation::AddTable { table, flags: TableFlags::default() }
}

fn add_chain(name: &str) -> Operation {
    Operation::AddChain { table: table(), chain: Chain::regular(name.parse().unwrap()) }
}

fn add_rule(chain: &str, rule: Rule) -> Operation {
    Operation::AddRule { table: table(), chain: chain.parse().unwrap(), place: Place::End, rule }
}

fn transaction<T>(operations: impl IntoIterator<Item = (Operation, T)>) -> Transaction<T> {
    let mut transaction = Transaction::new();
    transaction.extend(operations);
    transaction
}

fn untagged(operations: impl IntoIterator<Item = Operation>) -> Transaction {
    transaction(operations.into_iter().map(|operation| (operation, ())))
}

fn in_namespace(test: impl FnOnce(&Host, &mut Connection) -> Result<()> + Send) -> Result<()> {
    let host = Host::new()?;
    host.enter(|| test(&host, &mut Connection::open()?))
}

#[test]
fn a_refused_transaction_changes_nothing_and_reports_each_refused_operation() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let jump = |chain: &str| Rule::new().verdict(Verdict::Goto(chain.parse().unwrap()));
        let unknown = Expr::Other { name: "nwfilter_no_such".into(), data: Vec::new() };
        let missing: SetName = "missing".parse()?;
        let refused = connection.commit(
            &transaction([
                (add_table(table()), "table"),
                (add_chain("a"), "chain"),
                (add_rule("a", Rule::new().equal(field::ETHER_TYPE, [8, 0]).expr(unknown)), "unknown"),
                (add_rule("a", jump("nowhere")), "jump"),
                (add_rule("a", Rule::new().is_in(&[field::IIFNAME], &missing)), "lookup"),
                (add_rule("a", Rule::new().counter()), "good"),
            ]),
            None,
        );
        let Err(CommitError::Refused { first, others }) = refused else { panic!("{refused:?}") };
        assert_eq!((first.tag, first.errno), ("unknown", Errno::ENOENT));
        assert!(first.is_unsupported());
        assert_eq!(
            first.to_string(),
            "the kernel cannot add rule bridge t a with 'nwfilter_no_such': No such file or directory"
        );
        let others: Vec<_> = others.iter().map(|refusal| (refusal.tag, refusal.is_unsupported())).collect();
        assert_eq!(others, [("jump", false), ("lookup", false)]);
        assert_eq!(connection.table(&table())?, None);
        Ok(())
    })
}

#[test]
fn a_transaction_for_another_generation_is_not_carried_out() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let before = connection.generation()?;
        connection.commit(&untagged([add_table(table())]), Some(before))?;
        assert_eq!(connection.generation()?, before + 1);
        let late = connection.commit(&untagged([add_chain("late")]), Some(before));
        assert!(matches!(late, Err(CommitError::Interrupted)), "{late:?}");
        assert!(connection.table(&table())?.unwrap().chains.is_empty());
        Ok(())
    })
}

#[test]
fn validating_tells_refusals_and_changes_nothing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let before = connection.generation()?;
        connection.validate(&untagged([add_table(table()), add_chain("a")]))?;
        let refused = connection.validate(&untagged([add_chain("a")]));
        assert!(matches!(refused, Err(CommitError::Refused { .. })), "{refused:?}");
        assert_eq!(connection.table(&table())?, None);
        assert_eq!(connection.generation()?, before);
        Ok(())
    })
}

#[test]
fn twenty_thousand_elements_go_in_and_come_back() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let set = Arc::new(Set::new("macs".parse()?, [Datatype::Ifname, Datatype::EtherAddr]));
        let mut elements: Vec<Element> = (0..20_000u32)
            .map(|number| {
                let [_, _, a, b] = number.to_be_bytes();
                let port = field::ifname(&format!("vnet{}", number % 1000)).unwrap();
                Element::new(ElementKey::one(&[&port[..], &[0x52, 0x54, 0, 0, a, b]]))
            })
            .collect();
        elements.sort();
        let add = |elements| Operation::AddElements { table: table(), set: set.clone(), elements };
        connection.commit(
            &untagged([
                add_table(table()),
                Operation::AddSet { table: table(), set: set.clone() },
                add(elements.clone()),
            ]),
            None,
        )?;
        let read = |connection: &mut Connection| -> Result<Vec<Element>> {
            let installed = connection.table(&table())?.unwrap();
            Ok(installed.sets[&set.name].elements.iter().map(|element| element.element.clone()).collect())
        };
        assert_eq!(read(connection)?, elements);
        let gone: Vec<Element> = elements.split_off(10);
        connection.commit(
            &untagged([Operation::DeleteElements { table: table(), set: set.clone(), elements: gone }]),
            None,
        )?;
        assert_eq!(read(connection)?, elements);
        Ok(())
    })
}

#[test]
fn thousands_of_refusals_are_refusals() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let rules = (0..20_000).map(|number| (add_rule("missing", Rule::new().counter()), number));
        let refused = connection.commit(&transaction(rules), None);
        let Err(CommitError::Refused { first, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(first.tag, 0);
        // The connection goes on.
        connection.commit(&untagged([add_table(table())]), None)?;
        Ok(())
    })
}

#[test]
fn an_element_that_does_not_fit_its_set_is_not_sent() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let set = Arc::new(Set::new("macs".parse()?, [Datatype::EtherAddr]));
        let elements = vec![Element::new(ElementKey::One(vec![1, 2, 3]))];
        let invalid = connection.commit(
            &transaction([(Operation::AddElements { table: table(), set, elements }, "element")]),
            None,
        );
        let Err(error @ CommitError::Invalid { tag: "element", .. }) = invalid else { panic!("{invalid:?}") };
        assert_eq!(
            error.to_string(),
            "add element bridge t macs: the set macs has keys of 6 bytes, this has 3"
        );
        Ok(())
    })
}

#[test]
fn an_owned_table_belongs_to_its_connection() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"));
    in_namespace(|_, connection| {
        let mut owner = Connection::open()?;
        let flags = TableFlags { owner: true, ..TableFlags::default() };
        owner.commit(&untagged([Operation::AddTable { table: table(), flags }]), None)?;
        let read = connection.table(&table())?.unwrap();
        assert_eq!((read.flags, read.owner), (flags, Some(owner.port())));
        let refused = connection.commit(&untagged([add_chain("a")]), None);
        let Err(CommitError::Refused { first, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(first.errno, Errno::EPERM);
        drop(owner);
        // A process that another test forks has the socket, too, until it executes its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while connection.table(&table())?.is_some() {
            assert!(Instant::now() < deadline, "the table outlives its owner");
            std::thread::yield_now();
        }
        Ok(())
    })
}

#[test]
fn changes_of_the_table_are_reported_with_the_process_that_made_them() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("nft"));
    in_namespace(|host, connection| {
        let mut monitor = Monitor::open([table()])?;
        connection.commit(&untagged([add_table(table()), add_chain("a")]), None)?;
        let other = TableId::bridge("other".parse()?);
        connection.commit(&untagged([add_table(other)]), None)?;
        host.run(&["nft", "add rule bridge t a counter; add set bridge t s { type mark; }"])?;

        let mut ready = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::try_from(Duration::from_secs(10))?)?, 1);
        let events = monitor.events()?;
        let [Event::Changed(own), Event::Changed(foreign)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(own.port, connection.port());
        assert_eq!(own.parts, [Part::Table(table()), Part::Chain("a".into())].into());
        assert_ne!(foreign.port, connection.port());
        assert_eq!(foreign.process.as_ref().map(|(_, name)| &**name), Some("nft"));
        assert_eq!(foreign.parts, [Part::Chain("a".into()), Part::Set("s".into())].into());
        assert_eq!(foreign.generation, connection.generation()?);
        Ok(())
    })
}
