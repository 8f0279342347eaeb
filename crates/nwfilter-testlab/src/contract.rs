//! What every backend promises, as one suite: the macro [`backend_contract!`](crate::backend_contract) makes a test of
//! each promise.
//!
//! ```no_run
//! use nwfilter_rules::Fake;
//! use nwfilter_testlab::contract::Contract;
//!
//! fn fake(check: fn(&Contract<'_>)) {
//!     let fake = Fake::new();
//!     let somebody = nwfilter_rules::Process { name: "nft".into(), id: 7 };
//!     check(&Contract { backend: &fake, host: None, lose: &|port| fake.lose(port, &somebody) });
//! }
//!
//! nwfilter_testlab::backend_contract!(fake);
//! # fn main() {}
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Assertions of tests.

use std::collections::BTreeSet;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nwfilter_rules::{
    ApplyError, Backend, Batch, DesiredSet, Filters, LogGroup, Origin, Ruleset, SetContent, Subject, Watch,
    instantiate,
};
use nwfilter_xml::{Filter, FilterName, PortDev, SetFamily, SetName, SetRange, read_binding, read_filter};

use crate::Host;

/// A backend under test.
pub struct Contract<'a> {
    /// The backend. It holds no rule of any port.
    pub backend: &'a dyn Backend,
    /// Whose kernel it writes to; `None` for one without a kernel.
    pub host: Option<&'a Host>,
    /// Removes rules of a port as another program would, all or some.
    pub lose: &'a (dyn Fn(&PortDev) + Sync),
}

/// Makes a test of each promise of a backend. The argument is a function that prepares a [`Contract`] and calls the
/// check that it is given with it; it may return early to skip.
#[macro_export]
macro_rules! backend_contract {
    ($with:ident) => {
        $crate::backend_contract!(@ $with:
            a_port_gets_its_rules_once_and_applying_again_changes_nothing
            replacing_one_port_leaves_the_others
            a_removed_port_leaves_nothing
            a_refused_rule_changes_nothing_and_names_port_and_origin
            plan_shows_what_apply_changes_and_changes_nothing
            a_port_that_others_change_is_reported_planned_and_repaired
            a_set_holds_what_it_must_from_before_its_rules_until_after_them
            logging_of_drops_comes_and_goes_as_any_change
            clearing_leaves_no_port
        );
    };
    (@ $with:ident: $($check:ident)+) => {
        $(
            #[test]
            fn $check() {
                $with($crate::contract::$check);
            }
        )+
    };
}

impl Contract<'_> {
    fn within<R: Send>(&self, act: impl FnOnce() -> R + Send) -> R {
        match self.host {
            Some(host) => host.enter(act),
            None => act(),
        }
    }

    fn apply(&self, batch: &Batch) -> nwfilter_rules::Applied {
        self.within(|| self.backend.apply(batch)).unwrap()
    }

    fn plan(&self, batch: &Batch) -> Vec<nwfilter_rules::Difference> {
        self.within(|| self.backend.plan(batch)).unwrap().differences
    }

    fn installed(&self) -> BTreeSet<PortDev> {
        self.within(|| self.backend.installed()).unwrap().ports
    }
}

fn port(number: u8) -> PortDev {
    format!("port{number}").parse().unwrap()
}

/// A ruleset of Ethernet and IP rules that accepts a TCP port and drops the rest.
fn accepting(port: u16) -> Arc<Ruleset> {
    ruleset(&format!(
        "<filter name='f' chain='root'>\n<rule action='drop' direction='out' priority='-100'>\
         <mac match='no' srcmacaddr='$MAC'/></rule>\n\
         <rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule>\n\
         <rule action='drop' direction='inout'><all/></rule></filter>"
    ))
}

/// A ruleset whose fourth line no backend can enforce.
fn impossible() -> Arc<Ruleset> {
    ruleset(
        "<filter name='f'>\n<rule action='accept' direction='in'><tcp dstportstart='22'/></rule>\n\n\
         <rule action='drop' direction='in'><all ipset='no-such-set' ipsetflags='src'/></rule></filter>",
    )
}

fn ruleset(filter: &str) -> Arc<Ruleset> {
    let filter: Filter = read_filter("f.xml", filter).into_result().unwrap();
    let binding = read_binding(
        "b.xml",
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='port0'/><mac address='52:54:00:7b:35:93'/><filterref filter='f'/></filterbinding>",
    );
    Arc::new(instantiate(&Store(filter), &binding.into_result().unwrap()).unwrap())
}

/// One filter, and sets of IPv4 addresses named `set-`.
struct Store(Filter);

impl Filters for Store {
    fn filter(&self, _: &FilterName) -> Option<&Filter> {
        Some(&self.0)
    }

    fn set(&self, name: &SetName) -> Option<SetFamily> {
        name.as_str().starts_with("set-").then_some(SetFamily::Ipv4)
    }
}

fn batch(ports: impl IntoIterator<Item = (u8, Arc<Ruleset>)>) -> Batch {
    let mut batch = Batch::default();
    ports.into_iter().for_each(|(number, ruleset)| batch.filter(port(number), ruleset));
    batch
}

/// See the name.
pub fn a_port_gets_its_rules_once_and_applying_again_changes_nothing(contract: &Contract<'_>) {
    assert!(contract.installed().is_empty());
    let wanted = batch([(0, accepting(22)), (1, accepting(80)), (2, Arc::new(Ruleset::drop_all()))]);
    assert_eq!(contract.apply(&wanted).changed.len(), 3);
    assert_eq!(contract.installed(), wanted.ports.keys().cloned().collect());
    let again = contract.apply(&wanted);
    assert_eq!((again.changed.len(), again.commits), (0, 0));
    assert_eq!(contract.plan(&wanted), []);
}

/// See the name.
pub fn replacing_one_port_leaves_the_others(contract: &Contract<'_>) {
    let before = batch([(0, accepting(22)), (1, accepting(22))]);
    contract.apply(&before);
    let after = batch([(0, accepting(80)), (1, accepting(22))]);
    assert_eq!(contract.apply(&after).changed, BTreeSet::from([port(0)]));
    assert_eq!(contract.plan(&after), []);
    assert!(!contract.plan(&before).is_empty());
}

/// See the name.
pub fn logging_of_drops_comes_and_goes_as_any_change(contract: &Contract<'_>) {
    let logging = |ruleset: Arc<Ruleset>| Arc::new((*ruleset).clone().logging_drops(LogGroup::default()));
    let without = batch([(0, accepting(22)), (1, accepting(22))]);
    let with = batch([(0, logging(accepting(22))), (1, accepting(22))]);
    contract.apply(&without);
    assert_eq!(contract.apply(&with).changed, BTreeSet::from([port(0)]));
    assert_eq!(contract.plan(&with), []);
    assert_eq!(contract.apply(&with).commits, 0);
    assert_eq!(contract.apply(&without).changed, BTreeSet::from([port(0)]));
    assert_eq!(contract.plan(&without), []);
}

/// See the name.
pub fn a_removed_port_leaves_nothing(contract: &Contract<'_>) {
    contract.apply(&batch([(0, accepting(22)), (1, accepting(22))]));
    let mut gone = Batch::default();
    gone.remove(port(0));
    gone.remove(port(9));
    assert_eq!(contract.apply(&gone).changed, BTreeSet::from([port(0)]));
    assert_eq!(contract.installed(), BTreeSet::from([port(1)]));
    assert_eq!(contract.plan(&gone), []);
}

/// See the name.
pub fn a_refused_rule_changes_nothing_and_names_port_and_origin(contract: &Contract<'_>) {
    let before = batch([(0, accepting(22))]);
    contract.apply(&before);
    let refused = batch([(0, accepting(80)), (1, impossible()), (2, accepting(22))]);
    let error = contract.within(|| contract.backend.apply(&refused)).unwrap_err();
    let (named, origin): (PortDev, Origin) = match error {
        ApplyError::Refused(refused) => (refused.port, refused.origin),
        ApplyError::Unsupported { port, source } => (port, source.origin),
        other => panic!("{other:?}"),
    };
    assert_eq!((named, origin.to_string().as_str()), (port(1), "f:4"));
    assert_eq!(contract.plan(&before), []);
    assert_eq!(contract.installed(), BTreeSet::from([port(0)]));
}

/// See the name.
pub fn plan_shows_what_apply_changes_and_changes_nothing(contract: &Contract<'_>) {
    let mut wanted = batch([(0, accepting(22))]);
    let planned = contract.plan(&wanted);
    assert!(contract.installed().is_empty());
    let of_filter = |d: &&nwfilter_rules::Difference| d.origin.as_ref().is_some_and(|o| o.line > 0);
    assert!(planned.iter().filter(of_filter).all(|d| d.subject == Subject::Port(port(0))));
    let lines = planned.iter().filter(of_filter).filter_map(|d| Some(d.origin.as_ref()?.line));
    assert_eq!(lines.collect::<BTreeSet<_>>(), BTreeSet::from([2, 3, 4]), "{planned:#?}");
    assert!(planned.is_sorted());
    wanted.report_differences = true;
    assert_eq!(contract.apply(&wanted).differences, planned);
    assert_eq!(contract.apply(&wanted).differences, []);
}

/// See the name.
pub fn a_port_that_others_change_is_reported_planned_and_repaired(contract: &Contract<'_>) {
    let wanted = batch([(0, accepting(22)), (1, accepting(22))]);
    contract.apply(&wanted);
    let mut watch = contract.within(|| contract.backend.watch()).unwrap().expect("it can watch");
    contract.apply(&batch([(2, accepting(22))]));
    let own = contract.within(|| watch.changes()).unwrap();
    assert_eq!(own, [], "what the backend writes is not reported");
    (contract.lose)(&port(0));
    wait(&*watch);
    let changes = contract.within(|| watch.changes()).unwrap();
    assert!(!changes.is_empty() && changes.iter().all(|change| change.by.is_some()), "{changes:?}");
    let planned = contract.plan(&wanted);
    assert!(planned.iter().any(|difference| difference.subject == Subject::Port(port(0))), "{planned:?}");
    assert!(contract.apply(&wanted).changed.contains(&port(0)));
    assert_eq!(contract.plan(&wanted), []);
}

/// Waits until a watch is readable.
fn wait(watch: &dyn Watch) {
    let mut descriptors = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut descriptors, PollTimeout::from(10_000u16)), Ok(1), "nothing is reported");
}

/// See the name.
pub fn a_set_holds_what_it_must_from_before_its_rules_until_after_them(contract: &Contract<'_>) {
    let set: SetName = "set-a".parse().unwrap();
    let holds = |entries: &[&str]| {
        let ranges = entries.iter().map(|entry| SetRange::parse(SetFamily::Ipv4, entry).unwrap());
        DesiredSet::Holds(Arc::new(SetContent::of(SetFamily::Ipv4, ranges)))
    };
    let asking = ruleset(
        "<filter name='f'>\n<rule action='drop' direction='in'><all ipset='set-a' ipsetflags='src'/></rule></filter>",
    );
    let rules = batch([(0, asking)]);
    let error = contract.within(|| contract.backend.apply(&rules)).unwrap_err();
    assert!(matches!(&error, ApplyError::Refused(refused) if refused.origin.line == 2), "{error:?}");

    let with = |desired: DesiredSet| Batch { sets: [(set.clone(), desired)].into(), ..rules.clone() };
    let first = with(holds(&["10.0.0.1", "10.1.0.0/16"]));
    let applied = contract.apply(&first);
    assert_eq!((applied.changed.len(), applied.changed_sets), (1, [set.clone()].into()));
    assert_eq!(contract.within(|| contract.backend.installed()).unwrap().sets, [set.clone()].into());
    let again = contract.apply(&first);
    assert_eq!((again.changed_sets.len(), again.commits), (0, 0));

    let second = with(holds(&["10.0.0.1", "10.0.0.3"]));
    let planned = contract.plan(&second);
    assert!(planned.iter().all(|difference| difference.subject == Subject::Set(set.clone())), "{planned:?}");
    let shown: BTreeSet<_> = planned.iter().map(|difference| difference.rule.as_str()).collect();
    assert_eq!(shown, ["10.0.0.3", "10.1.0.0/16"].into());
    let applied = contract.apply(&second);
    assert_eq!((applied.changed.len(), applied.changed_sets.len()), (0, 1), "no rule is written");
    assert_eq!(contract.plan(&second), []);

    let mut gone = Batch { sets: [(set.clone(), DesiredSet::Gone)].into(), ..Batch::default() };
    gone.remove(port(0));
    assert_eq!(contract.apply(&gone).changed_sets, [set].into());
    assert!(contract.within(|| contract.backend.installed()).unwrap().sets.is_empty());
    assert_eq!(contract.apply(&gone).commits, 0);
}

/// See the name.
pub fn clearing_leaves_no_port(contract: &Contract<'_>) {
    contract.apply(&batch((0..20).map(|number| (number, accepting(22)))));
    let cleared = contract.within(|| contract.backend.clear()).unwrap();
    assert_eq!(cleared.changed.len(), 20);
    assert!(contract.installed().is_empty());
    let again = contract.within(|| contract.backend.clear()).unwrap();
    assert_eq!((again.changed.len(), again.commits), (0, 0));
}
