//! A host whose ports the tests of the driver filter, and a backend that only remembers.

#![allow(dead_code)] // Not every test needs all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use nwfilter::rules::{
    Applied, ApplyError, Backend, Batch, Desired, Difference, Installed, Origin, RootEntry, Ruleset,
};
use nwfilter::xml::{Binding, PortDev, read_binding};
use nwfilter::{Config, Driver, Error, Xtables};
use nwfilter_testlab::Host;

/// A host with interfaces, and stores of its own.
pub(crate) struct Lab {
    pub(crate) host: Host,
    pub(crate) dir: tempfile::TempDir,
}

impl Lab {
    /// A host with the interfaces `p0`, `p1` and so on in its bridge.
    pub(crate) fn new(ports: usize) -> Self {
        let host = Host::new().unwrap();
        let add = |index| format!("tuntap add dev p{index} mode tap\nlink set p{index} master br0 up");
        if ports > 0 {
            host.ip(&(0..ports).map(add).collect::<Vec<_>>()).unwrap();
        }
        Self { host, dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn config(&self) -> Config {
        Config { config_dir: self.filters(), state_dir: self.bindings() }
    }

    pub(crate) fn filters(&self) -> PathBuf {
        self.dir.path().join("filters")
    }

    pub(crate) fn bindings(&self) -> PathBuf {
        self.dir.path().join("bindings")
    }

    pub(crate) fn driver(&self) -> Driver {
        Driver::open(self.config(), Xtables::default()).unwrap().without_learner()
    }

    /// Puts a binding into the store behind the driver's back.
    pub(crate) fn write_binding(&self, port: &str, filter: &str) {
        fs::create_dir_all(self.bindings()).unwrap();
        fs::write(self.bindings().join(format!("{port}.xml")), binding_xml(port, filter)).unwrap();
    }

    /// Takes a filter out of the store behind the driver's back.
    pub(crate) fn lose_filter(&self, name: &str) {
        fs::remove_file(self.filters().join(format!("{name}.xml"))).unwrap();
    }

    /// What the kernel holds for a port, as text.
    pub(crate) fn port(&self, name: &str) -> String {
        format!("{:?}", self.host.saved().unwrap().port(name))
    }

    /// What must stay as it is when something is refused: the kernel and the documents.
    pub(crate) fn state(&self) -> (String, Vec<(PathBuf, String)>) {
        let mut files = Vec::new();
        for directory in [self.filters(), self.bindings()] {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                files.push((entry.path(), fs::read_to_string(entry.path()).unwrap()));
            }
        }
        files.sort();
        (format!("{:?}", self.host.saved().unwrap()), files)
    }
}

pub(crate) fn binding_xml(port: &str, filter: &str) -> String {
    format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'/></filterbinding>"
    )
}

pub(crate) fn binding(port: &str, filter: &str) -> Binding {
    read_binding("binding.xml", &binding_xml(port, filter)).into_result().unwrap()
}

/// A filter with one rule for the port.
pub(crate) fn accepting(name: &str, port: u16) -> String {
    format!(
        "<filter name='{name}'><rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule></filter>"
    )
}

/// A filter that no kernel takes, because of its second line.
pub(crate) fn refused(name: &str) -> String {
    format!(
        "<filter name='{name}'>\n<rule action='drop' direction='in'><tcp ipset='no-such-set'/></rule></filter>"
    )
}

/// An error with its causes.
pub(crate) fn explained(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub(crate) fn names<'a>(ports: impl IntoIterator<Item = &'a PortDev>) -> Vec<&'a str> {
    ports.into_iter().map(PortDev::as_str).collect()
}

/// A kernel of which only the promise of [`Backend`] is kept.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<FakeKernel>>);

#[derive(Default)]
pub(crate) struct FakeKernel {
    pub(crate) held: BTreeMap<PortDev, Arc<Ruleset>>,
    /// The ports whose rules from filters are refused.
    pub(crate) refuses: BTreeSet<String>,
    /// The ports of each batch that was to be applied, in order.
    pub(crate) asked: Vec<Vec<String>>,
    /// Whether the next batch ends in a panic.
    pub(crate) panics: bool,
    /// What the next batch waits at twice: when it has begun, and before it goes on.
    pub(crate) gate: Option<Arc<Barrier>>,
    /// How long a batch takes.
    pub(crate) takes: Duration,
}

impl Fake {
    pub(crate) fn kernel(&self) -> std::sync::MutexGuard<'_, FakeKernel> {
        self.0.lock().unwrap()
    }

    pub(crate) fn driver(&self, lab: &Lab) -> Driver {
        Driver::open(lab.config(), self.clone()).unwrap().without_learner()
    }
}

impl Backend for Fake {
    fn apply(&self, batch: &Batch) -> Result<Applied, ApplyError> {
        let takes = self.kernel().takes;
        std::thread::sleep(takes);
        let gate = self.kernel().gate.take();
        for gate in gate.iter().flat_map(|gate| [gate; 2]) {
            gate.wait();
        }
        let mut kernel = self.kernel();
        if std::mem::take(&mut kernel.panics) {
            drop(kernel);
            panic!("the backend has a bug");
        }
        kernel.asked.push(batch.ports.keys().map(ToString::to_string).collect());
        for (port, desired) in &batch.ports {
            let Desired::Filtered(ruleset) = desired else { continue };
            if let Some(origin) = origin(ruleset).filter(|_| kernel.refuses.contains(port.as_str())) {
                let (rule, why) = ("a rule".to_owned(), "refused".to_owned());
                return Err(ApplyError::Refused { origin, port: port.clone(), tool: "fake", rule, why });
            }
        }
        let mut applied = Applied { commits: 1, ..Applied::default() };
        for (port, desired) in &batch.ports {
            let changed = match desired {
                Desired::Filtered(ruleset) => {
                    kernel.held.insert(port.clone(), ruleset.clone()).as_ref() != Some(ruleset)
                }
                Desired::Gone => kernel.held.remove(port).is_some(),
            };
            if changed {
                applied.changed.insert(port.clone());
            }
        }
        Ok(applied)
    }

    fn installed(&self) -> Result<Installed, ApplyError> {
        Ok(Installed { ports: self.kernel().held.keys().cloned().collect(), ..Installed::default() })
    }

    fn diff(&self, _: &Batch) -> Result<Vec<Difference>, ApplyError> {
        Ok(Vec::new())
    }
}

/// The rule of a filter that a ruleset has first, on the IPv4 or the Ethernet layer.
fn origin(ruleset: &Ruleset) -> Option<Origin> {
    let ip = ruleset.ipv4.iter().flat_map(|part| &part.to_guest);
    let ethernet = ruleset.ethernet.from_guest.iter().flat_map(|side| &side.root);
    let ethernet = ethernet.filter_map(|entry| match entry {
        RootEntry::Rule(rule) => Some(rule),
        RootEntry::Jump(_) => None,
    });
    ip.chain(ethernet).map(|rule| rule.origin.clone()).find(|origin| origin.filter.is_some())
}

/// Defines filters; each is a document.
pub(crate) fn define(driver: &Driver, filters: &[String]) -> Result<(), Error> {
    filters.iter().try_for_each(|filter| driver.define_filter("test.xml", filter).map(drop))
}
