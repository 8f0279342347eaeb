//! What a test needs of the machine, and how it is skipped where that is missing.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use crate::netns::Netns;
use crate::tools::find;

/// Something a test cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Being root, with the right to make namespaces.
    Root,
    /// A program on the `PATH`.
    Tool(&'static str),
    /// A file that a package brings.
    File(&'static str),
    /// `libvirtd`, `virsh` and libvirt's stock filters.
    Libvirtd,
    /// `libvirtd` and `qemu-system-x86_64`, to run a real (emulated) guest.
    Qemu,
    /// A kernel that tracks bridged connections without br_netfilter (nf_conntrack_bridge), as that of the virtual
    /// machine does. A test that needs it is in a target named `vm_*`, which `cargo xtask test` runs there.
    BridgeConntrack,
}

/// Why a test is skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    reason: String,
    /// Whether the test is run elsewhere, so that nothing is lost by skipping it here.
    elsewhere: bool,
}

impl Skip {
    fn new(reason: impl fmt::Display) -> Self {
        Self { reason: reason.to_string(), elsewhere: false }
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Skip {}

/// The return types of tests that [`skip_unless!`](crate::skip_unless) can return from.
pub trait Skipped {
    /// The value a skipped test returns.
    fn skipped() -> Self;
}

impl Skipped for () {
    fn skipped() -> Self {}
}

impl<E> Skipped for Result<(), E> {
    fn skipped() -> Self {
        Ok(())
    }
}

/// Returns from the test, saying why on stderr, unless every [`Need`] is met.
///
/// With `NWFILTER_NO_SKIP=1` in the environment a missing need is a panic, so that a machine meant
/// to run every test cannot silently skip one. [`Need::BridgeConntrack`] alone is skipped then too,
/// except in the virtual machine.
#[macro_export]
macro_rules! skip_unless {
    ($($need:expr),+ $(,)?) => {
        if let Err(reason) = $crate::requirements(&[$($need),+]) {
            $crate::skip(&reason);
            return $crate::Skipped::skipped();
        }
    };
}

/// Checks that all needs are met; the error names the first that is not.
pub fn requirements(needs: &[Need]) -> Result<(), Skip> {
    needs.iter().try_for_each(|need| match need {
        Need::Root => root(),
        Need::Tool(name) => tool(name),
        Need::File(path) => file(path),
        Need::Libvirtd => libvirtd(),
        Need::Qemu => libvirtd().and_then(|()| tool("qemu-system-x86_64")),
        Need::BridgeConntrack => bridge_conntrack(),
    })
}

/// Prints `skipped: <reason>` to stderr.
///
/// # Panics
///
/// When `NWFILTER_NO_SKIP=1` is set in the environment, unless the test is run elsewhere.
pub fn skip(reason: &Skip) {
    if !reason.elsewhere && std::env::var_os("NWFILTER_NO_SKIP").is_some_and(|value| value == "1") {
        panic!("NWFILTER_NO_SKIP is set, yet this test cannot run: {reason}");
    }
    eprintln!("skipped: {reason}");
}

fn root() -> Result<(), Skip> {
    static ROOT: OnceLock<Result<(), Skip>> = OnceLock::new();
    ROOT.get_or_init(|| {
        if !nix::unistd::geteuid().is_root() {
            return Err(Skip::new("not root"));
        }
        let flags = nix::sched::CloneFlags::CLONE_NEWNET | nix::sched::CloneFlags::CLONE_NEWNS;
        match std::thread::spawn(move || nix::sched::unshare(flags)).join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Skip::new(format!("cannot make namespaces: {error}"))),
            Err(_) => Err(Skip::new("cannot make namespaces")),
        }
    })
    .clone()
}

fn file(path: &str) -> Result<(), Skip> {
    if Path::new(path).exists() { Ok(()) } else { Err(Skip::new(format_args!("there is no {path}"))) }
}

fn tool(name: &str) -> Result<(), Skip> {
    find(name).map(drop).map_err(Skip::new)
}

fn libvirtd() -> Result<(), Skip> {
    tool("libvirtd")?;
    tool("virsh")?;
    let stock = "/etc/libvirt/nwfilter/clean-traffic.xml";
    fs::exists(stock)
        .unwrap_or(false)
        .then_some(())
        .ok_or_else(|| Skip::new(format!("no stock filter {stock}")))
}

/// Whether the kernel takes a rule that asks for the state of a bridged connection.
fn bridge_conntrack() -> Result<(), Skip> {
    const RULE: &str =
        "table bridge probe { chain c { type filter hook prerouting priority 0; ct state new; }; }";
    static HAS_IT: OnceLock<Result<(), Skip>> = OnceLock::new();
    HAS_IT
        .get_or_init(|| {
            root()?;
            tool("nft")?;
            let netns = Netns::new("probe").map_err(Skip::new)?;
            netns.run_with_stdin(&["nft", "-f", "-"], RULE).map(drop).map_err(|_| Skip {
                reason: "needs nf_conntrack_bridge; run in the virtual machine by cargo xtask test".into(),
                elsewhere: std::env::var_os("NWFILTER_VM").is_none(),
            })
        })
        .clone()
}
