//! Events: what changed, for a main loop.

use std::ffi::c_char;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use nwfilter::{Event, EventQueue, Next};

use crate::call::{self, Maker, call};
use crate::code::nwf_code;
use crate::error::nwf_error;
use crate::input::{self, Structure};

/// The events of a driver since nwf_driver_events. It belongs to the caller, who frees it with nwf_event_queue_free. It may
/// outlive its driver. At most 1024 events wait in it; how many were lost is an event. Threads may take from it at the same
/// time.
pub struct nwf_event_queue {
    maker: Maker,
    events: Mutex<EventQueue>,
}

/// What happened. New numbers may be added at the end.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nwf_event_kind {
    /// No event waits.
    NWF_EVENT_NONE = 0,
    /// No event will come any more, because the driver was freed.
    NWF_EVENT_CLOSED = 1,
    /// A filter was put into the store.
    NWF_EVENT_FILTER_DEFINED = 2,
    /// A filter was taken out of the store.
    NWF_EVENT_FILTER_UNDEFINED = 3,
    /// A port was bound.
    NWF_EVENT_BINDING_CREATED = 4,
    /// A bound port was given another binding.
    NWF_EVENT_BINDING_REPLACED = 5,
    /// A port was unbound.
    NWF_EVENT_BINDING_DELETED = 6,
    /// The guest at a port has other addresses than before; state says how far the port is from its filter.
    NWF_EVENT_ADDRESS_CHANGED = 7,
    /// The kernel did not have the rules of a port, and has them again.
    NWF_EVENT_DRIFT_REPAIRED = 8,
    /// The kernel did not have what all ports share, and has it again.
    NWF_EVENT_HOST_REPAIRED = 9,
    /// Events are missing here, because they were not taken out in time; lost says how many.
    NWF_EVENT_LOST = 10,
    /// Something that this version of the library has no number for.
    NWF_EVENT_OTHER = 11,
    /// A set was put into the store.
    NWF_EVENT_SET_DEFINED = 12,
    /// A set holds something else.
    NWF_EVENT_SET_CHANGED = 13,
    /// A set was taken out of the store.
    NWF_EVENT_SET_UNDEFINED = 14,
    /// A set does not hold in the kernel what it must; the report of a reload says why.
    NWF_EVENT_SET_FAILED = 15,
}

use nwf_event_kind::*;

/// An event. The caller sets size.
#[repr(C)]
pub struct nwf_event {
    /// sizeof(nwf_event)
    pub size: usize,
    /// What happened.
    pub kind: nwf_event_kind,
    /// The bytes of name.
    pub name_length: u32,
    /// How many events were lost, of NWF_EVENT_LOST; else 0.
    pub lost: u64,
    /// The filter, the set or the port, followed by a zero byte; empty where there is none.
    pub name: [c_char; 256],
    /// Of NWF_EVENT_ADDRESS_CHANGED one of: filtered, learning, unattended, refused, learned, leased. Else empty.
    pub state: [c_char; 32],
}

// SAFETY: it is repr(C), begins with its size, and is only ever written for the caller, never read.
unsafe impl Structure for nwf_event {
    const FIRST_SIZE: usize = 312;

    fn set_size(&mut self, size: usize) {
        self.size = size;
    }
}

impl nwf_event {
    fn new(kind: nwf_event_kind, name: &str, state: &str) -> Self {
        let (name, name_length) = bytes(name);
        Self { size: 0, kind, name_length, lost: 0, name, state: bytes(state).0 }
    }

    fn of(next: &Next) -> Self {
        let event = match next {
            Next::Empty => return Self::new(NWF_EVENT_NONE, "", ""),
            Next::Closed => return Self::new(NWF_EVENT_CLOSED, "", ""),
            Next::Event(event) => event,
        };
        match event {
            Event::FilterDefined(name) => Self::new(NWF_EVENT_FILTER_DEFINED, name.as_str(), ""),
            Event::FilterUndefined(name) => Self::new(NWF_EVENT_FILTER_UNDEFINED, name.as_str(), ""),
            Event::SetDefined(name) => Self::new(NWF_EVENT_SET_DEFINED, name.as_str(), ""),
            Event::SetChanged(name) => Self::new(NWF_EVENT_SET_CHANGED, name.as_str(), ""),
            Event::SetUndefined(name) => Self::new(NWF_EVENT_SET_UNDEFINED, name.as_str(), ""),
            Event::SetFailed(name) => Self::new(NWF_EVENT_SET_FAILED, name.as_str(), ""),
            Event::BindingCreated(port) => Self::new(NWF_EVENT_BINDING_CREATED, port.as_str(), ""),
            Event::BindingReplaced(port) => Self::new(NWF_EVENT_BINDING_REPLACED, port.as_str(), ""),
            Event::BindingDeleted(port) => Self::new(NWF_EVENT_BINDING_DELETED, port.as_str(), ""),
            Event::AddressChanged { port, state } => {
                Self::new(NWF_EVENT_ADDRESS_CHANGED, port.as_str(), state.name())
            }
            Event::DriftRepaired(port) => Self::new(NWF_EVENT_DRIFT_REPAIRED, port.as_str(), ""),
            Event::HostRepaired => Self::new(NWF_EVENT_HOST_REPAIRED, "", ""),
            Event::Lost(count) => Self { lost: *count, ..Self::new(NWF_EVENT_LOST, "", "") },
            _ => Self::new(NWF_EVENT_OTHER, "", ""),
        }
    }
}

/// A text in so many bytes, the zero byte at the end included. Names are shorter: that of a filter has at most 251 bytes.
fn bytes<const SIZE: usize>(text: &str) -> ([c_char; SIZE], u32) {
    let mut copy = [0; SIZE];
    let fits = (0..=text.len().min(SIZE - 1)).rev().find(|length| text.is_char_boundary(*length));
    let length = fits.unwrap_or(0);
    for (to, from) in copy.iter_mut().zip(&text.as_bytes()[..length]) {
        *to = *from as c_char;
    }
    (copy, length as u32)
}

impl nwf_event_queue {
    pub(crate) fn new(events: EventQueue) -> Self {
        Self { maker: Maker::this(), events: Mutex::new(events) }
    }
}

/// The file descriptor to poll for reading: it is readable while events wait, and when the driver was freed. It may be so
/// once more than there are events. It belongs to the queue, and nobody else reads or closes it. -1 if the queue is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_event_queue_fd(queue: *const nwf_event_queue) -> i32 {
    // SAFETY: by the contract of the header a handle is null or valid.
    let queue = unsafe { queue.as_ref() }.filter(|queue| queue.maker.is_this());
    queue.map_or(-1, |queue| queue.events.lock().unwrap_or_else(PoisonError::into_inner).as_fd().as_raw_fd())
}

/// Takes the next event out, and never waits: *event is of the kind NWF_EVENT_NONE if none waits. A main loop calls it
/// until then, each time that the file descriptor is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_event_queue_next(
    queue: *mut nwf_event_queue,
    event: *mut nwf_event,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let queue = input::handle(queue, "queue")?;
            queue.maker.check()?;
            // An event that cannot be given to the caller stays where it is.
            input::fill(event, nwf_event::new(NWF_EVENT_NONE, "", ""), "event")?;
            let next = queue.events.lock().unwrap_or_else(PoisonError::into_inner).take();
            input::fill(event, nwf_event::of(&next), "event")
        })
    }
}

/// The name of a kind, such as "binding-created"; "other" for a number that is none. The text is part of the library.
#[unsafe(no_mangle)]
pub extern "C" fn nwf_event_kind_name(kind: i32) -> *const c_char {
    let name = match kind {
        0 => c"none",
        1 => c"closed",
        2 => c"filter-defined",
        3 => c"filter-undefined",
        4 => c"binding-created",
        5 => c"binding-replaced",
        6 => c"binding-deleted",
        7 => c"address-changed",
        8 => c"drift-repaired",
        9 => c"host-repaired",
        10 => c"lost",
        12 => c"set-defined",
        13 => c"set-changed",
        14 => c"set-undefined",
        15 => c"set-failed",
        _ => c"other",
    };
    name.as_ptr()
}

/// Frees a queue and closes its file descriptor; nothing if it is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_event_queue_free(queue: *mut nwf_event_queue) {
    let drop_here = |queue: nwf_event_queue| {
        // In a child the queue's lock may be held for ever by a thread of the parent, and the descriptor is shared.
        if queue.maker.is_this() { drop(queue) } else { mem::forget(queue) }
    };
    // SAFETY: by the contract of the header the handle is null, or valid and freed once.
    unsafe { call::free(queue, drop_here) }
}

const _: () = assert!(mem::size_of::<nwf_event>() == nwf_event::FIRST_SIZE);
