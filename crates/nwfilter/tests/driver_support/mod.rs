//! A host whose ports the tests of the driver filter.

#![allow(dead_code)] // Not every test needs all of it.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc::SYS_futex;
use nix::unistd::{Pid, gettid};
use nwfilter::xml::{Binding, PortDev, read_binding};
use nwfilter::{Config, Driver, Error, Fake};
use nwfilter_testlab::Host;
use nwfilter_xtables::Xtables;

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
        Config::new(self.filters(), self.bindings())
    }

    pub(crate) fn filters(&self) -> PathBuf {
        self.dir.path().join("filters")
    }

    pub(crate) fn bindings(&self) -> PathBuf {
        self.dir.path().join("bindings")
    }

    pub(crate) fn driver(&self) -> Driver {
        Driver::builder().config(self.config()).without_learner().open(Xtables::default()).unwrap()
    }

    pub(crate) fn fake_driver(&self, fake: &Fake) -> Driver {
        Driver::builder().config(self.config()).without_learner().open(fake.clone()).unwrap()
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

/// The ports of each batch that a fake is asked to apply, in order.
pub(crate) fn record(fake: &Fake) -> Arc<Mutex<Vec<Vec<String>>>> {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let record = asked.clone();
    fake.before_apply(move |batch| {
        record.lock().unwrap().push(batch.ports.keys().map(ToString::to_string).collect());
    });
    asked
}

/// Defines filters; each is a document.
pub(crate) fn define(driver: &Driver, filters: &[String]) -> Result<(), Error> {
    filters.iter().try_for_each(|filter| driver.define_filter("test.xml", filter).map(drop))
}

/// Threads of which a test needs to know that they wait for each other or for a lock.
#[derive(Default)]
pub(crate) struct Sleepers(Mutex<Vec<Pid>>);

impl Sleepers {
    /// The calling thread is going to wait.
    pub(crate) fn join(&self) {
        self.0.lock().unwrap().push(gettid());
    }

    /// Returns when so many threads have joined and all of them wait.
    pub(crate) fn wait_for(&self, threads: usize) {
        let waits = |thread: &Pid| {
            // The number of the system call it is in, or `running`.
            let call = fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap();
            call.split(' ').next() == Some(&SYS_futex.to_string())
        };
        let begin = Instant::now();
        loop {
            let joined = self.0.lock().unwrap().clone();
            if joined.len() == threads && joined.iter().all(waits) {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "of {threads} threads {joined:?} came");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
