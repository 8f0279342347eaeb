//! A laboratory of network namespaces in which the code under test, and libvirt itself as the
//! oracle, filter the traffic of taps and guests with the real kernel.
//!
//! A [`Host`] is a fresh network namespace with a bridge `br0`. A [`Tap`] is a port of that bridge
//! whose every frame the test writes and reads; a [`Guest`] is a port with a real IP stack behind
//! it. [`Netns::enter`] runs the code under test in the namespace, [`Libvirtd`] runs a live daemon
//! there, and [`Host::saved`] tells what either of them left in ebtables, iptables and ip6tables.
//! Whatever a value started or made disappears when it is dropped, also when the test panics.
//!
//! ```
//! use std::time::Duration;
//! use nwfilter_testlab::{Ends, Host, Need, frames, skip_unless};
//!
//! fn main() -> anyhow::Result<()> {
//!     skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ebtables"));
//!     let host = Host::new()?;
//!     let (a, b) = (host.tap("tap0")?, host.tap("tap1")?);
//!     let ends = Ends::v4(
//!         "52:54:00:00:00:0a".parse()?, "10.0.0.1".parse()?,
//!         "52:54:00:00:00:0b".parse()?, "10.0.0.2".parse()?,
//!     );
//!     let frame = frames::udp(&ends, 1000, 2000, b"hello");
//!     assert!(a.delivers(&b, &frame)?);
//!
//!     host.run(&["ebtables", "-A", "FORWARD", "-i", "tap0", "-j", "DROP"])?;
//!     assert!(!a.delivers(&b, &frame)?);
//!     assert_eq!(b.recv(Duration::ZERO)?, None);
//!     Ok(())
//! }
//! ```

mod cases;
pub mod conformance;
pub mod contract;
pub mod corpus;
pub mod frames;
pub mod generate;
mod guest;
mod host;
mod inject;
mod libvirtd;
mod modules;
mod names;
mod need;
mod netns;
mod pair;
pub mod probes;
pub mod rate;
mod saved;
pub mod seed;
mod services;
pub mod stream;
mod tap;
mod tools;
mod verdicts;

pub use frames::{Ends, Mac};
pub use guest::{Guest, GuestBuilder};
pub use host::{BRIDGE, BRIDGE_MAC, Host, HostBuilder};
pub use inject::Injector;
pub use libvirtd::{Connect, Libvirtd, LibvirtdOptions};
pub use modules::DriverDir;
pub use names::{filter_name, port_dev};
pub use need::{Need, Skip, Skipped, requirements, skip};
pub use netns::{Netns, Process, remove_all, sweep};
pub use saved::{Saved, Tool};
pub use services::Service;
pub use tap::Tap;
pub use tools::Tools;
pub use verdicts::{Arrival, Verdicts, What};
