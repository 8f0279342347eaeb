//! Safe functions over the symbols of the libvirt that loaded the module. The symbols are looked up once.

use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use nwfilter_xml::{Binding, Filter, Uuid};

use crate::abi::{
    BindingIdentity, BindingPort, CheckBinding, CheckFilter, CloseConnect, Connect, EnsureBinding,
    EnsureConnect, EnsureFilter, FilterIdentity, FilterUuid, FreeBinding, FreeFilter, GetConnect,
    GetNwFilter, GetNwFilterBinding, GetUri, GetVersion, LogMessage, NwFilter, NwFilterBinding,
    NwFilterDriver, RegisterConnectDriver, RegisterStateDriver, ReportError, SetSharedNwFilterDriver, Tables,
};
use crate::probe::Slot;
use crate::refusal::{Code, Refusal};

/// The oldest libvirt whose layouts are known to be those of `abi`.
const OLDEST: c_ulong = 9_000_000;
/// The newest libvirt for which that was checked.
const NEWEST_TRIED: c_ulong = 12_008_000;

/// VIR_FROM_NWFILTER: the domain of the errors of this driver.
const ERROR_DOMAIN: c_int = 33;

macro_rules! symbol {
    ($name:literal as $type:ty) => {{
        let address = $crate::libvirt::lookup(concat!($name, "\0"), $name)?;
        // SAFETY: a function pointer is as large as an object pointer here, and the address is that of a function
        // whose type is libvirt's for this name.
        unsafe { std::mem::transmute::<*mut std::ffi::c_void, $type>(address) }
    }};
}
pub(crate) use symbol;

/// Why the module cannot work in the process that loaded it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("this libvirt has no symbol '{0}'")]
    NoSymbol(&'static str),
    #[error("libvirt {} is older than 9.0.0, the first whose driver interface is known", shown(*.0))]
    TooOld(c_ulong),
    #[error("libvirt's {0} failed")]
    Refused(&'static str),
    #[error("the handles of this libvirt have an unknown layout")]
    Handles,
    #[error("the definitions of filters and bindings of this libvirt have an unknown layout")]
    Definitions,
    #[error("this libvirt calls {called:?} of the driver where it should call {slot:?}")]
    Misplaced { slot: Slot, called: Vec<Slot> },
}

/// The symbols that the module calls.
pub(crate) struct Libvirt {
    register_connect_driver: RegisterConnectDriver,
    set_shared_driver: SetSharedNwFilterDriver,
    register_state_driver: RegisterStateDriver,
    report_error: ReportError,
    get_filter: GetNwFilter,
    get_binding: GetNwFilterBinding,
    filter_uuid: FilterUuid,
    binding_port: BindingPort,
    get_uri: GetUri,
    access: Access,
    handle_connect: HandleConnect,
}

/// Where a handle keeps its connection: the index of a pointer from the start of the handle.
#[derive(Clone, Copy)]
struct HandleConnect {
    filter: usize,
    binding: usize,
}

impl HandleConnect {
    /// Finds the connection among the first pointers of two handles that are made for this. No function of libvirt returns
    /// the connection of a handle.
    fn find(get_filter: GetNwFilter, get_binding: GetNwFilterBinding) -> Result<Self, LoadError> {
        let get_connect = symbol!("virGetConnect" as GetConnect);
        let close = symbol!("virConnectClose" as CloseConnect);
        let free_filter = symbol!("virNWFilterFree" as FreeFilter);
        let free_binding = symbol!("virNWFilterBindingFree" as FreeBinding);
        let (name, uuid) = (c"layout", [0; 16]);
        // SAFETY: the connection is not open, which nothing here needs; libvirt copies name and UUID.
        let connect = unsafe { get_connect() };
        if connect.is_null() {
            return Err(LoadError::Refused("virGetConnect"));
        }
        // SAFETY: as above.
        let filter = unsafe { get_filter(connect, name.as_ptr(), uuid.as_ptr()) };
        // SAFETY: as above.
        let binding = unsafe { get_binding(connect, name.as_ptr(), name.as_ptr()) };
        let found = (position(filter.cast(), connect), position(binding.cast(), connect));
        // SAFETY: each was made above, is not used any more, and is freed only if it was made.
        unsafe {
            if !filter.is_null() {
                free_filter(filter);
            }
            if !binding.is_null() {
                free_binding(binding);
            }
            close(connect);
        }
        match found {
            (Some(filter), Some(binding)) => Ok(Self { filter, binding }),
            _ => Err(LoadError::Handles),
        }
    }
}

/// libvirt's access control, as set by `access_drivers` in the daemon's configuration.
struct Access {
    open: EnsureConnect,
    count: (EnsureConnect, CheckFilter),
    list_names: (EnsureConnect, CheckFilter),
    list: (EnsureConnect, CheckFilter),
    lookup_by_name: EnsureFilter,
    lookup_by_uuid: EnsureFilter,
    define: EnsureFilter,
    define_flags: EnsureFilter,
    undefine: EnsureFilter,
    dump: EnsureFilter,
    list_bindings: (EnsureConnect, CheckBinding),
    lookup_binding: EnsureBinding,
    create_binding: EnsureBinding,
    delete_binding: EnsureBinding,
    dump_binding: EnsureBinding,
}

/// An operation on one filter.
#[derive(Clone, Copy)]
pub(crate) enum FilterAccess {
    LookupByName,
    LookupByUuid,
    Define,
    DefineFlags,
    Undefine,
    Dump,
}

/// An operation on one binding.
#[derive(Clone, Copy)]
pub(crate) enum BindingAccess {
    Lookup,
    Create,
    Delete,
    Dump,
}

/// An operation that lists objects.
#[derive(Clone, Copy)]
pub(crate) enum FilterList {
    Count,
    Names,
    Handles,
}

static LIBVIRT: OnceLock<Libvirt> = OnceLock::new();

impl Libvirt {
    /// Looks up every symbol, so that a missing one is reported before a domain needs it.
    pub(crate) fn load() -> Result<&'static Libvirt, LoadError> {
        check_version()?;
        let filters =
            |ensure: EnsureConnect, check: CheckFilter| -> (EnsureConnect, CheckFilter) { (ensure, check) };
        let get_filter = symbol!("virGetNWFilter" as GetNwFilter);
        let get_binding = symbol!("virGetNWFilterBinding" as GetNwFilterBinding);
        let handle_connect = HandleConnect::find(get_filter, get_binding)?;
        let libvirt = Libvirt {
            register_connect_driver: symbol!("virRegisterConnectDriver" as RegisterConnectDriver),
            set_shared_driver: symbol!("virSetSharedNWFilterDriver" as SetSharedNwFilterDriver),
            register_state_driver: symbol!("virRegisterStateDriver" as RegisterStateDriver),
            report_error: symbol!("virReportErrorHelper" as ReportError),
            get_filter,
            get_binding,
            filter_uuid: symbol!("virNWFilterGetUUID" as FilterUuid),
            binding_port: symbol!("virNWFilterBindingGetPortDev" as BindingPort),
            get_uri: symbol!("virConnectGetURI" as GetUri),
            handle_connect,
            access: Access {
                open: symbol!("virConnectOpenEnsureACL" as EnsureConnect),
                count: filters(
                    symbol!("virConnectNumOfNWFiltersEnsureACL" as EnsureConnect),
                    symbol!("virConnectNumOfNWFiltersCheckACL" as CheckFilter),
                ),
                list_names: filters(
                    symbol!("virConnectListNWFiltersEnsureACL" as EnsureConnect),
                    symbol!("virConnectListNWFiltersCheckACL" as CheckFilter),
                ),
                list: filters(
                    symbol!("virConnectListAllNWFiltersEnsureACL" as EnsureConnect),
                    symbol!("virConnectListAllNWFiltersCheckACL" as CheckFilter),
                ),
                lookup_by_name: symbol!("virNWFilterLookupByNameEnsureACL" as EnsureFilter),
                lookup_by_uuid: symbol!("virNWFilterLookupByUUIDEnsureACL" as EnsureFilter),
                define: symbol!("virNWFilterDefineXMLEnsureACL" as EnsureFilter),
                define_flags: symbol!("virNWFilterDefineXMLFlagsEnsureACL" as EnsureFilter),
                undefine: symbol!("virNWFilterUndefineEnsureACL" as EnsureFilter),
                dump: symbol!("virNWFilterGetXMLDescEnsureACL" as EnsureFilter),
                list_bindings: (
                    symbol!("virConnectListAllNWFilterBindingsEnsureACL" as EnsureConnect),
                    symbol!("virConnectListAllNWFilterBindingsCheckACL" as CheckBinding),
                ),
                lookup_binding: symbol!("virNWFilterBindingLookupByPortDevEnsureACL" as EnsureBinding),
                create_binding: symbol!("virNWFilterBindingCreateXMLEnsureACL" as EnsureBinding),
                delete_binding: symbol!("virNWFilterBindingDeleteEnsureACL" as EnsureBinding),
                dump_binding: symbol!("virNWFilterBindingGetXMLDescEnsureACL" as EnsureBinding),
            },
        };
        Ok(LIBVIRT.get_or_init(|| libvirt))
    }

    /// libvirt's log function. It is looked up first, so that missing symbols can be logged.
    pub(crate) fn log() -> Result<LogMessage, LoadError> {
        Ok(symbol!("virLogMessage" as LogMessage))
    }

    /// The loaded libvirt. It is set before libvirt can call a function of the driver.
    pub(crate) fn get() -> Option<&'static Libvirt> {
        LIBVIRT.get()
    }

    /// Registers the driver's tables with libvirt, which keeps them until the process ends.
    pub(crate) fn register(&self, tables: Tables) -> Result<(), LoadError> {
        let Tables { connect, nwfilter, state } = tables;
        let nwfilter: *mut NwFilterDriver = Box::leak(Box::new(nwfilter));
        let connect = Box::leak(Box::new(connect));
        connect.nwfilter = nwfilter;
        // SAFETY: the tables have libvirt's layout and live for ever.
        if unsafe { (self.register_connect_driver)(connect, false) } < 0 {
            return Err(LoadError::Refused("virRegisterConnectDriver"));
        }
        // SAFETY: as above.
        if unsafe { (self.set_shared_driver)(nwfilter) } < 0 {
            return Err(LoadError::Refused("virSetSharedNWFilterDriver"));
        }
        // SAFETY: as above.
        if unsafe { (self.register_state_driver)(Box::leak(Box::new(state))) } < 0 {
            return Err(LoadError::Refused("virRegisterStateDriver"));
        }
        Ok(())
    }

    /// Sets the calling thread's last libvirt error, which also appears in libvirt's log.
    pub(crate) fn report(&self, code: Code, message: &str) {
        let message = c_string(message);
        let (file, function) = (c"nwfilter-module", c"nwfilter");
        // SAFETY: the strings live through the call, and the format takes exactly one string.
        unsafe {
            (self.report_error)(
                ERROR_DOMAIN,
                code as c_int,
                file.as_ptr(),
                function.as_ptr(),
                0,
                c"%s".as_ptr(),
                message.as_ptr(),
            );
        }
    }

    /// A new handle of a filter. Null if libvirt has reported an error.
    pub(crate) fn filter_handle(&self, connect: *mut Connect, filter: &Filter) -> *mut NwFilter {
        let (name, uuid) = (c_string(filter.name.as_str()), uuid_of(filter));
        // SAFETY: the connection is libvirt's own, and libvirt copies name and UUID.
        unsafe { (self.get_filter)(connect, name.as_ptr(), uuid.as_bytes().as_ptr()) }
    }

    /// A new handle of a binding. Null if libvirt has reported an error.
    pub(crate) fn binding_handle(&self, connect: *mut Connect, binding: &Binding) -> *mut NwFilterBinding {
        let (port, filter) = (c_string(binding.port.as_str()), c_string(binding.filter.as_str()));
        // SAFETY: the connection is libvirt's own, and libvirt copies both names.
        unsafe { (self.get_binding)(connect, port.as_ptr(), filter.as_ptr()) }
    }

    /// The connection of a handle.
    pub(crate) fn filter_connect(&self, filter: *mut NwFilter) -> *mut Connect {
        let index = self.handle_connect.filter;
        // SAFETY: every filter handle has its connection at this index.
        unsafe { filter.cast::<*mut Connect>().add(index).read() }
    }

    /// The connection of a handle.
    pub(crate) fn binding_connect(&self, binding: *mut NwFilterBinding) -> *mut Connect {
        let index = self.handle_connect.binding;
        // SAFETY: every binding handle has its connection at this index.
        unsafe { binding.cast::<*mut Connect>().add(index).read() }
    }

    /// The UUID in a handle.
    pub(crate) fn filter_uuid(&self, filter: *mut NwFilter) -> Result<Uuid, Refusal> {
        let mut uuid = [0; 16];
        // SAFETY: libvirt hands only valid handles to its drivers, and its UUIDs have 16 bytes.
        allowed(unsafe { (self.filter_uuid)(filter, uuid.as_mut_ptr()) })?;
        Ok(Uuid::from_bytes(uuid))
    }

    /// The port in a handle.
    pub(crate) fn binding_port(&self, binding: *mut NwFilterBinding) -> Result<String, Refusal> {
        // SAFETY: libvirt hands only valid handles to its drivers, and the port lives as long as the handle.
        text(unsafe { (self.binding_port)(binding) })
    }

    /// The URI that a connection is opened with.
    pub(crate) fn uri(&self, connect: *mut Connect) -> Result<String, Refusal> {
        // SAFETY: the connection is libvirt's own; what comes back is ours to free.
        let uri = unsafe { (self.get_uri)(connect) };
        let copy = text(uri);
        // SAFETY: free takes what libvirt allocated, or null.
        unsafe { libc::free(uri.cast()) };
        copy
    }

    // ---- access control by libvirt, which reports the error if access is denied ----

    pub(crate) fn may_open(&self, connect: *mut Connect) -> Result<(), Refusal> {
        // SAFETY: the connection is libvirt's own.
        allowed(unsafe { (self.access.open)(connect) })
    }

    pub(crate) fn may_do(
        &self,
        access: FilterAccess,
        connect: *mut Connect,
        filter: &Filter,
    ) -> Result<(), Refusal> {
        let ensure = match access {
            FilterAccess::LookupByName => self.access.lookup_by_name,
            FilterAccess::LookupByUuid => self.access.lookup_by_uuid,
            FilterAccess::Define => self.access.define,
            FilterAccess::DefineFlags => self.access.define_flags,
            FilterAccess::Undefine => self.access.undefine,
            FilterAccess::Dump => self.access.dump,
        };
        // SAFETY: the connection is libvirt's own, and the identity lives through the call.
        with_filter(filter, |identity| allowed(unsafe { ensure(connect, identity) }))
    }

    pub(crate) fn may_do_binding(
        &self,
        access: BindingAccess,
        connect: *mut Connect,
        binding: &Binding,
    ) -> Result<(), Refusal> {
        let ensure = match access {
            BindingAccess::Lookup => self.access.lookup_binding,
            BindingAccess::Create => self.access.create_binding,
            BindingAccess::Delete => self.access.delete_binding,
            BindingAccess::Dump => self.access.dump_binding,
        };
        // SAFETY: the connection is libvirt's own, and the identity lives through the call.
        with_binding(binding, |identity| allowed(unsafe { ensure(connect, identity) }))
    }

    /// Checks that a connection may list filters. The returned function says whether it may see a given one.
    pub(crate) fn visible_filters(
        &self,
        list: FilterList,
        connect: *mut Connect,
    ) -> Result<impl Fn(&Filter) -> bool, Refusal> {
        let (ensure, check) = match list {
            FilterList::Count => self.access.count,
            FilterList::Names => self.access.list_names,
            FilterList::Handles => self.access.list,
        };
        // SAFETY: the connection is libvirt's own.
        allowed(unsafe { ensure(connect) })?;
        // SAFETY: as above, and the identity lives through the call.
        Ok(move |filter: &Filter| with_filter(filter, |identity| unsafe { check(connect, identity) }))
    }

    /// Checks that a connection may list bindings. The returned function says whether it may see a given one.
    pub(crate) fn visible_bindings(
        &self,
        connect: *mut Connect,
    ) -> Result<impl Fn(&Binding) -> bool, Refusal> {
        let (ensure, check) = self.access.list_bindings;
        // SAFETY: the connection is libvirt's own.
        allowed(unsafe { ensure(connect) })?;
        // SAFETY: as above, and the identity lives through the call.
        Ok(move |binding: &Binding| with_binding(binding, |identity| unsafe { check(connect, identity) }))
    }
}

/// The UUID of a filter: its own, else one derived from its name. Files that were not defined through libvirt, such as
/// those of packages, have none.
pub(crate) fn uuid_of(filter: &Filter) -> Uuid {
    const NAMESPACE: Uuid = Uuid::from_u128(0x6d2b_7f0e_5a2c_4c0b_9a4e_3c1f_0d8e_7b61);
    filter.uuid.unwrap_or_else(|| Uuid::new_v5(&NAMESPACE, filter.name.as_str().as_bytes()))
}

/// Copies a C string. Null and invalid UTF-8 are refused.
pub(crate) fn text(pointer: *const c_char) -> Result<String, Refusal> {
    if pointer.is_null() {
        return Err(Refusal::new(Code::InvalidArg, "a null pointer where a text is needed"));
    }
    // SAFETY: libvirt's texts end with a zero byte, and this one is not null.
    let text = unsafe { CStr::from_ptr(pointer) };
    let text =
        text.to_str().map_err(|error| Refusal::new(Code::InvalidArg, format!("the text is {error}")))?;
    Ok(text.to_owned())
}

/// Makes a C string. It ends at the first zero byte, which no valid name or document has.
pub(crate) fn c_string(text: &str) -> CString {
    let until_zero = text.split('\0').next().unwrap_or_default();
    CString::new(until_zero).unwrap_or_default()
}

/// The index of a connection among the first pointers of a handle. In any libvirt, a handle has at least an object header
/// of two or three pointers, the connection, and two more pointers.
fn position(handle: *const c_void, connect: *mut Connect) -> Option<usize> {
    const POINTERS: usize = 5;
    if handle.is_null() {
        return None;
    }
    // SAFETY: a handle is larger than this, and aligned for pointers.
    (0..POINTERS).find(|&index| unsafe { handle.cast::<*mut Connect>().add(index).read() } == connect)
}

fn allowed(answer: c_int) -> Result<(), Refusal> {
    if answer < 0 { Err(Refusal::reported()) } else { Ok(()) }
}

fn with_filter<T>(filter: &Filter, ask: impl FnOnce(*const FilterIdentity) -> T) -> T {
    let name = c_string(filter.name.as_str());
    let uuid = *uuid_of(filter).as_bytes();
    ask(&FilterIdentity { name: name.as_ptr(), uuid, absent: FilterIdentity::ABSENT })
}

fn with_binding<T>(binding: &Binding, ask: impl FnOnce(*const BindingIdentity) -> T) -> T {
    let (owner, port) = (c_string(&binding.owner.name), c_string(binding.port.as_str()));
    let (filter, link) = (c_string(binding.filter.as_str()), binding.link.as_deref().map(c_string));
    ask(&BindingIdentity {
        owner_name: owner.as_ptr(),
        owner_uuid: *binding.owner.uuid.as_bytes(),
        port: port.as_ptr(),
        link: link.as_ref().map_or(null(), |link| link.as_ptr()),
        mac: binding.mac.0,
        filter: filter.as_ptr(),
        absent: FilterIdentity::ABSENT,
    })
}

/// The address of a function of libvirt. Its name is given with and without a terminating zero byte.
pub(crate) fn lookup(terminated: &str, name: &'static str) -> Result<*mut c_void, LoadError> {
    // SAFETY: the name ends with a zero byte. The global scope has libvirt, which loaded this module.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, terminated.as_ptr().cast()) };
    if address.is_null() { Err(LoadError::NoSymbol(name)) } else { Ok(address) }
}

fn check_version() -> Result<(), LoadError> {
    let get_version = symbol!("virGetVersion" as GetVersion);
    let mut version = 0;
    // SAFETY: the first pointer is written to, and the other two may be null.
    if unsafe { get_version(&raw mut version, null(), null_mut()) } < 0 {
        return Err(LoadError::Refused("virGetVersion"));
    }
    if version < OLDEST {
        return Err(LoadError::TooOld(version));
    }
    if version > NEWEST_TRIED {
        let (this, tried) = (shown(version), shown(NEWEST_TRIED));
        log::warn!(
            "libvirt {this} is newer than {tried}, the last the nwfilter module was tried with; it is checked when the \
             driver starts"
        );
    }
    Ok(())
}

fn shown(version: c_ulong) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}
