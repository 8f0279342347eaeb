//! Keeps the driver in step with the guests of a libvirt that has no nwfilter driver of its own.
//!
//! Two ways, of which a host needs one:
//!
//! - [`Listener`] follows libvirt's events, on this host or from anywhere: what starts is filtered, what ends is not,
//!   and what was missed is made up for at every connect. A guest runs before its start is told; a [`Guard`] keeps
//!   its port closed until then.
//! - [`HookCall`] is what libvirt's hook script is told. libvirt waits for it, so a guest does not run before it is
//!   filtered, and does not start if it cannot be.
//!
//! Both read a guest's filters where its XML has them: in the interfaces' `<filterref>`, or in the metadata of
//! [`METADATA_NAMESPACE`](nwfilter_xml::METADATA_NAMESPACE), which a libvirt without nwfilter driver accepts.

#[cfg(feature = "events")]
mod events;
mod guard;
mod hook;
#[cfg(feature = "events")]
mod listen;
mod sync;

pub use guard::{Guard, GuardError};
pub use hook::{HookCall, HookError, Operation};
#[cfg(feature = "events")]
pub use listen::{ListenError, Listener, Pulse, Status, Stopper};
pub use sync::{Guest, Plan, Refused, Synced};
