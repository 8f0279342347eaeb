//! The parts of libvirt's C driver interface that the module relies on: struct layouts and function types.
//!
//! They are private to libvirt. They were compared for 9.0.0, 11.3.0 and 12.8.0, and are equal. At each start `probe`
//! checks that the running libvirt calls the functions of these tables.

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_ulong, c_void};
use std::ptr::{null, null_mut};

/// An opaque object of libvirt, of which only pointers are used.
macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        $($(#[$doc])*
        #[repr(C)]
        pub(crate) struct $name {
            _private: [u8; 0],
        })+
    };
}

opaque! {
    /// virConnect
    Connect,
    /// virNWFilter
    NwFilter,
    /// virNWFilterBinding
    NwFilterBinding,
}

/// virConnectDriver
#[repr(C)]
pub(crate) struct ConnectDriver {
    pub(crate) local_only: bool,
    pub(crate) remote_only: bool,
    pub(crate) embeddable: bool,
    /// An array that ends with a null pointer.
    pub(crate) uri_schemes: *const *const c_char,
    pub(crate) hypervisor: *mut HypervisorDriver,
    pub(crate) interface: *mut c_void,
    pub(crate) network: *mut c_void,
    pub(crate) node_device: *mut c_void,
    pub(crate) nwfilter: *mut NwFilterDriver,
    pub(crate) secret: *mut c_void,
    pub(crate) storage: *mut c_void,
}

/// The assumed number of operations in virHypervisorDriver. No libvirt has so many; about 260 are known.
pub(crate) const HYPERVISOR_SLOTS: usize = 512;

/// A question about a connection; the answer is 1, 0 or -1.
pub(crate) type AskConnect = extern "C" fn(*mut Connect) -> c_int;

/// virHypervisorDriver, with the operations that open and close connections only.
///
/// The places of the other operations differ between versions. `probe` finds those that are needed.
#[repr(C)]
pub(crate) struct HypervisorDriver {
    pub(crate) name: *const c_char,
    pub(crate) connect_uri_probe: *const c_void,
    pub(crate) connect_open: extern "C" fn(*mut Connect, *mut c_void, *mut c_void, c_uint) -> c_int,
    pub(crate) connect_close: extern "C" fn(*mut Connect) -> c_int,
    pub(crate) others: [Option<AskConnect>; HYPERVISOR_SLOTS],
}

/// virDrvOpenStatus: the results of connect_open.
pub(crate) mod open_status {
    use std::ffi::c_int;

    pub(crate) const SUCCESS: c_int = 0;
    pub(crate) const ERROR: c_int = -2;
}

/// virNWFilterDriver: the functions are those of libvirt-nwfilter.h, without virNWFilterLookupByUUIDString.
#[repr(C)]
pub(crate) struct NwFilterDriver {
    pub(crate) name: *const c_char,
    pub(crate) num_of_filters: extern "C" fn(*mut Connect) -> c_int,
    pub(crate) list_filters: extern "C" fn(*mut Connect, *mut *mut c_char, c_int) -> c_int,
    pub(crate) list_all_filters: extern "C" fn(*mut Connect, *mut *mut *mut NwFilter, c_uint) -> c_int,
    pub(crate) lookup_by_name: extern "C" fn(*mut Connect, *const c_char) -> *mut NwFilter,
    pub(crate) lookup_by_uuid: extern "C" fn(*mut Connect, *const c_uchar) -> *mut NwFilter,
    pub(crate) define_xml: extern "C" fn(*mut Connect, *const c_char) -> *mut NwFilter,
    pub(crate) define_xml_flags: extern "C" fn(*mut Connect, *const c_char, c_uint) -> *mut NwFilter,
    pub(crate) undefine: extern "C" fn(*mut NwFilter) -> c_int,
    pub(crate) get_xml_desc: extern "C" fn(*mut NwFilter, c_uint) -> *mut c_char,
    pub(crate) list_all_bindings:
        extern "C" fn(*mut Connect, *mut *mut *mut NwFilterBinding, c_uint) -> c_int,
    pub(crate) binding_lookup: extern "C" fn(*mut Connect, *const c_char) -> *mut NwFilterBinding,
    pub(crate) binding_create: extern "C" fn(*mut Connect, *const c_char, c_uint) -> *mut NwFilterBinding,
    pub(crate) binding_delete: extern "C" fn(*mut NwFilterBinding) -> c_int,
    pub(crate) binding_get_xml_desc: extern "C" fn(*mut NwFilterBinding, c_uint) -> *mut c_char,
}

/// virStateDriver: what the daemon calls when it starts, on SIGHUP, and when it ends.
///
/// The operations behind `reload` are null in every version.
#[repr(C)]
pub(crate) struct StateDriver {
    pub(crate) name: *const c_char,
    /// Set by libvirt.
    pub(crate) initialized: bool,
    /// (privileged, root, monolithic, callback, opaque)
    pub(crate) initialize: extern "C" fn(bool, *const c_char, bool, Option<Inhibit>, *mut c_void) -> c_int,
    pub(crate) cleanup: extern "C" fn() -> c_int,
    pub(crate) reload: extern "C" fn() -> c_int,
    pub(crate) absent: [*const c_void; 8],
}

impl StateDriver {
    pub(crate) const ABSENT: [*const c_void; 8] = [null(); 8];
    /// VIR_DRV_STATE_INIT_ERROR: the daemon ends.
    pub(crate) const ERROR: c_int = -1;
    /// VIR_DRV_STATE_INIT_SKIPPED
    pub(crate) const SKIPPED: c_int = 0;
    /// VIR_DRV_STATE_INIT_COMPLETE
    pub(crate) const COMPLETE: c_int = 1;
}

/// The tables that are registered with libvirt, which keeps pointers to them until the process ends.
pub(crate) struct Tables {
    pub(crate) connect: ConnectDriver,
    pub(crate) nwfilter: NwFilterDriver,
    pub(crate) state: StateDriver,
}

/// The first fields of libvirt's virNWFilterDef. Its access checks read no others.
#[repr(C)]
pub(crate) struct FilterIdentity {
    pub(crate) name: *const c_char,
    pub(crate) uuid: [c_uchar; 16],
    pub(crate) absent: [*const c_void; 16],
}

impl FilterIdentity {
    pub(crate) const ABSENT: [*const c_void; 16] = [null(); 16];
}

/// The first fields of libvirt's virNWFilterBindingDef. Its access checks read no others.
#[repr(C)]
pub(crate) struct BindingIdentity {
    pub(crate) owner_name: *const c_char,
    pub(crate) owner_uuid: [c_uchar; 16],
    pub(crate) port: *const c_char,
    pub(crate) link: *const c_char,
    pub(crate) mac: [c_uchar; 6],
    pub(crate) filter: *const c_char,
    pub(crate) absent: [*const c_void; 16],
}

/// virLogSource. libvirt fills in its later fields.
#[repr(C)]
pub(crate) struct LogSource {
    pub(crate) name: *const c_char,
    pub(crate) state: [c_uint; 14],
}

/// virStateInhibitCallback(inhibit, opaque)
pub(crate) type Inhibit = unsafe extern "C" fn(bool, *mut c_void);

pub(crate) type RegisterConnectDriver = unsafe extern "C" fn(*mut ConnectDriver, bool) -> c_int;
pub(crate) type SetSharedNwFilterDriver = unsafe extern "C" fn(*mut NwFilterDriver) -> c_int;
pub(crate) type RegisterStateDriver = unsafe extern "C" fn(*mut StateDriver) -> c_int;
pub(crate) type GetNwFilter =
    unsafe extern "C" fn(*mut Connect, *const c_char, *const c_uchar) -> *mut NwFilter;
pub(crate) type GetNwFilterBinding =
    unsafe extern "C" fn(*mut Connect, *const c_char, *const c_char) -> *mut NwFilterBinding;
pub(crate) type GetConnect = unsafe extern "C" fn() -> *mut Connect;
pub(crate) type CloseConnect = unsafe extern "C" fn(*mut Connect) -> c_int;
pub(crate) type FilterUuid = unsafe extern "C" fn(*mut NwFilter, *mut c_uchar) -> c_int;
pub(crate) type BindingPort = unsafe extern "C" fn(*mut NwFilterBinding) -> *const c_char;
pub(crate) type FreeFilter = unsafe extern "C" fn(*mut NwFilter) -> c_int;
pub(crate) type FreeBinding = unsafe extern "C" fn(*mut NwFilterBinding) -> c_int;
pub(crate) type GetUri = unsafe extern "C" fn(*mut Connect) -> *mut c_char;
pub(crate) type GetVersion = unsafe extern "C" fn(*mut c_ulong, *const c_char, *mut c_ulong) -> c_int;
pub(crate) type EnsureConnect = unsafe extern "C" fn(*mut Connect) -> c_int;
pub(crate) type EnsureFilter = unsafe extern "C" fn(*mut Connect, *const FilterIdentity) -> c_int;
pub(crate) type CheckFilter = unsafe extern "C" fn(*mut Connect, *const FilterIdentity) -> bool;
pub(crate) type EnsureBinding = unsafe extern "C" fn(*mut Connect, *const BindingIdentity) -> c_int;
pub(crate) type CheckBinding = unsafe extern "C" fn(*mut Connect, *const BindingIdentity) -> bool;

/// virReportErrorHelper(domain, code, file, function, line, format, …)
pub(crate) type ReportError =
    unsafe extern "C" fn(c_int, c_int, *const c_char, *const c_char, usize, *const c_char, ...);

/// virLogMessage(source, priority, file, line, function, metadata, format, …)
pub(crate) type LogMessage = unsafe extern "C" fn(
    *mut LogSource,
    c_int,
    *const c_char,
    c_int,
    *const c_char,
    *const LogMetadata,
    *const c_char,
    ...
);

/// virLogMetadata: a field of a message for the journal. A null key ends an array of them.
#[repr(C)]
pub(crate) struct LogMetadata {
    pub(crate) key: *const c_char,
    /// Its value; if null, `number` is.
    pub(crate) text: *const c_char,
    pub(crate) number: c_int,
}

/// Zeroed memory for `count` pointers and a terminating null pointer. libvirt frees it with free(3).
pub(crate) fn pointers<T>(count: usize) -> *mut *mut T {
    // SAFETY: calloc checks the multiplication and may be called with any numbers.
    let memory = unsafe { libc::calloc(count + 1, size_of::<*mut T>()) };
    if memory.is_null() { null_mut() } else { memory.cast() }
}
