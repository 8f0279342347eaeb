//! Keeps the driver in step with the guests of a libvirt that has no nwfilter driver of its own.
//!
//! There are two ways; a host needs one of them:
//!
//! - [`Listener`] follows libvirt's events: it binds the ports of guests that start and unbinds those of guests that end.
//!   At every connect it catches up with what it missed. A guest runs before the event of its start arrives; a [`Guard`]
//!   keeps its ports closed until then.
//! - [`HookCall`] is a call of libvirt's hook script. libvirt waits for the script, so a guest does not run before it is
//!   filtered, and does not start if it cannot be filtered.
//!
//! Both read a guest's filters from its XML: from `<filterref>` of its interfaces, or from the metadata of
//! [`METADATA_NAMESPACE`](nwfilter_xml::METADATA_NAMESPACE), which a libvirt without an nwfilter driver accepts.

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
