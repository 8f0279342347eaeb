//! The functions that libvirt calls. They convert between C and Rust, and report every error and panic to libvirt.

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::str::FromStr;
use std::sync::atomic::{AtomicPtr, Ordering};

use nwfilter_xml::Uuid;

use crate::abi::{
    Connect, ConnectDriver, HYPERVISOR_SLOTS, HypervisorDriver, Inhibit, NwFilter, NwFilterBinding,
    NwFilterDriver, StateDriver, Tables, open_status, pointers,
};
use crate::definitions;
use crate::inhibitor;
use crate::libvirt::{BindingAccess, FilterAccess, FilterList, Libvirt, c_string, text, uuid_of};
use crate::probe::{self, Slot};
use crate::refusal::{Code, Refusal};
use crate::service::{Role, Service};
use crate::validation::Validation;

/// VIR_NWFILTER_DEFINE_VALIDATE and VIR_NWFILTER_BINDING_CREATE_VALIDATE
const VALIDATE: c_uint = 1;

/// The only URI that is served, as in libvirt's driver.
const URI: &str = "nwfilter:///system";

/// The registered virHypervisorDriver.
static HYPERVISOR: AtomicPtr<HypervisorDriver> = AtomicPtr::new(null_mut());

/// The tables that are registered with libvirt.
pub(crate) fn driver() -> Tables {
    let schemes: &'static [*const c_char; 2] = Box::leak(Box::new([c"nwfilter".as_ptr(), null()]));
    let hypervisor = Box::leak(Box::new(HypervisorDriver {
        name: c"nwfilter".as_ptr(),
        connect_uri_probe: null(),
        connect_open,
        connect_close,
        others: [None; HYPERVISOR_SLOTS],
    }));
    HYPERVISOR.store(hypervisor, Ordering::Release);
    let connect = ConnectDriver {
        local_only: true,
        remote_only: false,
        embeddable: false,
        uri_schemes: schemes.as_ptr(),
        hypervisor,
        interface: null_mut(),
        network: null_mut(),
        node_device: null_mut(),
        nwfilter: null_mut(),
        secret: null_mut(),
        storage: null_mut(),
    };
    let nwfilter = NwFilterDriver {
        name: c"nwfilter".as_ptr(),
        num_of_filters,
        list_filters,
        list_all_filters,
        lookup_by_name,
        lookup_by_uuid,
        define_xml,
        define_xml_flags,
        undefine,
        get_xml_desc,
        list_all_bindings,
        binding_lookup,
        binding_create,
        binding_delete,
        binding_get_xml_desc,
    };
    let state = StateDriver {
        name: c"nwfilter".as_ptr(),
        initialized: false,
        initialize,
        cleanup,
        reload,
        absent: StateDriver::ABSENT,
    };
    Tables { connect, nwfilter, state }
}

/// Runs the safe part of a call of `slot`. If it fails, reports the error to libvirt and returns `failed`. Calls that the
/// probe makes end here.
fn serve<T>(slot: Slot, failed: T, call: impl FnOnce(&Libvirt) -> Result<T, Refusal>) -> T {
    if probe::notes(slot) {
        return failed;
    }
    report(failed, call)
}

/// As `serve`, for a function that the probe does not call.
fn report<T>(failed: T, call: impl FnOnce(&Libvirt) -> Result<T, Refusal>) -> T {
    // libvirt gets the tables only after it was looked up.
    let Some(libvirt) = Libvirt::get() else { return failed };
    let refusal = match catch_unwind(AssertUnwindSafe(|| call(libvirt))) {
        Ok(Ok(value)) => return value,
        Ok(Err(refusal)) => refusal,
        Err(panic) => Refusal::new(Code::Internal, format!("a bug of nwfilter: {}", said(&*panic))),
    };
    if let Refusal::New(code, message) = refusal {
        libvirt.report(code, &message);
    }
    failed
}

/// The message of a panic.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it panicked")
}

/// The daemon starts. It ends if another one filters the ports of this host. What else fails is tried again when somebody connects: a daemon without this driver would have no
/// domains with filters at all.
extern "C" fn initialize(
    privileged: bool,
    _: *const c_char,
    _: bool,
    inhibit: Option<Inhibit>,
    opaque: *mut c_void,
) -> c_int {
    inhibitor::init(inhibit, opaque);
    let role = if privileged { Role::System } else { Role::Session };
    let ready = report(false, |_| {
        // SAFETY: the table is the registered one, and the daemon serves nobody yet.
        let understood = unsafe { probe::check(HYPERVISOR.load(Ordering::Acquire)) };
        let understood = understood.and_then(|()| definitions::check());
        if let Err(error) = &understood {
            log::error!("no domain with filters will start: {error}");
        }
        Service::start(understood.map(|()| role))?;
        Ok(true)
    });
    match (ready, role) {
        (false, _) => StateDriver::ERROR,
        (true, Role::Session) => StateDriver::SKIPPED,
        (true, Role::System) => report(StateDriver::COMPLETE, |_| {
            Service::get()?;
            Ok(StateDriver::COMPLETE)
        }),
    }
}

/// The daemon ends.
extern "C" fn cleanup() -> c_int {
    report(-1, |_| {
        Service::hand_over()?;
        Ok(0)
    })
}

/// SIGHUP: the daemon reads its files again.
extern "C" fn reload() -> c_int {
    report(-1, |_| {
        Service::get()?.reload()?;
        Ok(0)
    })
}

extern "C" fn connect_open(connect: *mut Connect, _: *mut c_void, _: *mut c_void, _: c_uint) -> c_int {
    if probe::notes(Slot::ConnectOpen) {
        return open_status::SUCCESS;
    }
    report(open_status::ERROR, |libvirt| {
        let uri = libvirt.uri(connect)?;
        let without_query = uri.split('?').next().unwrap_or_default();
        if without_query != URI {
            return Err(Refusal::new(Code::Internal, format!("'{uri}' is not served, only {URI}")));
        }
        libvirt.may_open(connect)?;
        Service::get()?;
        Ok(open_status::SUCCESS)
    })
}

extern "C" fn connect_close(_: *mut Connect) -> c_int {
    probe::notes(Slot::ConnectClose);
    0
}

extern "C" fn num_of_filters(connect: *mut Connect) -> c_int {
    serve(Slot::NumOfFilters, -1, |libvirt| {
        let visible = libvirt.visible_filters(FilterList::Count, connect)?;
        let filters = Service::get()?.filters()?;
        count(filters.iter().filter(|filter| visible(filter)).count())
    })
}

extern "C" fn list_filters(connect: *mut Connect, names: *mut *mut c_char, room: c_int) -> c_int {
    serve(Slot::ListFilters, -1, |libvirt| {
        let visible = libvirt.visible_filters(FilterList::Names, connect)?;
        let filters = Service::get()?.filters()?;
        let room = usize::try_from(room).unwrap_or(0);
        let mut written = 0;
        for filter in filters.iter().filter(|filter| visible(filter)).take(room) {
            // SAFETY: the caller's array has room for that many names.
            unsafe { names.add(written).write(duplicate(filter.name.as_str())) };
            written += 1;
        }
        count(written)
    })
}

extern "C" fn list_all_filters(connect: *mut Connect, list: *mut *mut *mut NwFilter, flags: c_uint) -> c_int {
    serve(Slot::ListAllFilters, -1, |libvirt| {
        no_flags(flags, 0)?;
        let visible = libvirt.visible_filters(FilterList::Handles, connect)?;
        let mut filters = Service::get()?.filters()?;
        filters.retain(|filter| visible(filter));
        hand_over(list, filters.len(), |index| libvirt.filter_handle(connect, &filters[index]))
    })
}

extern "C" fn lookup_by_name(connect: *mut Connect, name: *const c_char) -> *mut NwFilter {
    serve(Slot::LookupByName, null_mut(), |libvirt| {
        let filter = Service::get()?.filter(&named(&text(name)?, Code::NoFilter)?)?;
        libvirt.may_do(FilterAccess::LookupByName, connect, &filter)?;
        Ok(libvirt.filter_handle(connect, &filter))
    })
}

extern "C" fn lookup_by_uuid(connect: *mut Connect, uuid: *const c_uchar) -> *mut NwFilter {
    serve(Slot::LookupByUuid, null_mut(), |libvirt| {
        if uuid.is_null() {
            return Err(Refusal::new(Code::InvalidArg, "a null pointer where a UUID is needed"));
        }
        // SAFETY: libvirt's UUIDs have 16 bytes, and this one is not null.
        let uuid = Uuid::from_bytes(unsafe { uuid.cast::<[u8; 16]>().read() });
        let filter = Service::get()?.filter_by_uuid(uuid)?;
        libvirt.may_do(FilterAccess::LookupByUuid, connect, &filter)?;
        Ok(libvirt.filter_handle(connect, &filter))
    })
}

extern "C" fn define_xml(connect: *mut Connect, xml: *const c_char) -> *mut NwFilter {
    serve(Slot::DefineXml, null_mut(), |libvirt| define(libvirt, FilterAccess::Define, connect, xml, 0))
}

extern "C" fn define_xml_flags(connect: *mut Connect, xml: *const c_char, flags: c_uint) -> *mut NwFilter {
    serve(Slot::DefineXmlFlags, null_mut(), |libvirt| {
        define(libvirt, FilterAccess::DefineFlags, connect, xml, flags)
    })
}

fn define(
    libvirt: &Libvirt,
    access: FilterAccess,
    connect: *mut Connect,
    xml: *const c_char,
    flags: c_uint,
) -> Result<*mut NwFilter, Refusal> {
    let service = Service::get()?;
    service.driver()?;
    let mut filter = service.read_filter(&text(xml)?, validation(flags)?)?;
    if let Ok(replaced) = service.filter(&filter.name) {
        libvirt.may_do(access, connect, &replaced)?;
        filter.uuid.get_or_insert(uuid_of(&replaced));
    }
    // With the UUID that was checked here, it cannot replace a filter with another UUID that is defined meanwhile.
    filter.uuid.get_or_insert_with(Uuid::new_v4);
    libvirt.may_do(access, connect, &filter)?;
    let filter = service.define(filter)?;
    Ok(libvirt.filter_handle(connect, &filter))
}

extern "C" fn undefine(filter: *mut NwFilter) -> c_int {
    serve(Slot::Undefine, -1, |libvirt| {
        let (service, connect) = (Service::get()?, libvirt.filter_connect(filter));
        let filter = service.filter_by_uuid(libvirt.filter_uuid(filter)?)?;
        libvirt.may_do(FilterAccess::Undefine, connect, &filter)?;
        service.undefine(&filter.name)?;
        Ok(0)
    })
}

extern "C" fn get_xml_desc(filter: *mut NwFilter, flags: c_uint) -> *mut c_char {
    serve(Slot::GetXmlDesc, null_mut(), |libvirt| {
        no_flags(flags, 0)?;
        let (service, connect) = (Service::get()?, libvirt.filter_connect(filter));
        let filter = service.filter_by_uuid(libvirt.filter_uuid(filter)?)?;
        libvirt.may_do(FilterAccess::Dump, connect, &filter)?;
        Ok(duplicate(&service.filter_xml(&filter)))
    })
}

extern "C" fn list_all_bindings(
    connect: *mut Connect,
    list: *mut *mut *mut NwFilterBinding,
    flags: c_uint,
) -> c_int {
    serve(Slot::ListAllBindings, -1, |libvirt| {
        no_flags(flags, 0)?;
        let visible = libvirt.visible_bindings(connect)?;
        let mut bindings = Service::get()?.bindings()?;
        bindings.retain(|binding| visible(binding));
        hand_over(list, bindings.len(), |index| libvirt.binding_handle(connect, &bindings[index]))
    })
}

extern "C" fn binding_lookup(connect: *mut Connect, port: *const c_char) -> *mut NwFilterBinding {
    serve(Slot::BindingLookup, null_mut(), |libvirt| {
        let binding = Service::get()?.binding(&named(&text(port)?, Code::NoBinding)?)?;
        libvirt.may_do_binding(BindingAccess::Lookup, connect, &binding)?;
        Ok(libvirt.binding_handle(connect, &binding))
    })
}

extern "C" fn binding_create(
    connect: *mut Connect,
    xml: *const c_char,
    flags: c_uint,
) -> *mut NwFilterBinding {
    serve(Slot::BindingCreate, null_mut(), |libvirt| {
        let (service, xml) = (Service::get()?, text(xml)?);
        service.driver()?;
        let binding = service.read_binding(&xml, validation(flags)?)?;
        libvirt.may_do_binding(BindingAccess::Create, connect, &binding)?;
        let binding = service.bind(binding)?;
        Ok(libvirt.binding_handle(connect, &binding))
    })
}

extern "C" fn binding_delete(binding: *mut NwFilterBinding) -> c_int {
    serve(Slot::BindingDelete, -1, |libvirt| {
        let (service, connect) = (Service::get()?, libvirt.binding_connect(binding));
        let binding = service.binding(&named(&libvirt.binding_port(binding)?, Code::NoBinding)?)?;
        libvirt.may_do_binding(BindingAccess::Delete, connect, &binding)?;
        service.unbind(&binding.port)?;
        Ok(0)
    })
}

extern "C" fn binding_get_xml_desc(binding: *mut NwFilterBinding, flags: c_uint) -> *mut c_char {
    serve(Slot::BindingGetXmlDesc, null_mut(), |libvirt| {
        no_flags(flags, 0)?;
        let (service, connect) = (Service::get()?, libvirt.binding_connect(binding));
        let binding = service.binding(&named(&libvirt.binding_port(binding)?, Code::NoBinding)?)?;
        libvirt.may_do_binding(BindingAccess::Dump, connect, &binding)?;
        Ok(duplicate(&service.binding_xml(&binding)))
    })
}

/// Parses the name of a filter or port. An invalid name is refused as one that does not exist.
fn named<T: FromStr<Err = nwfilter_xml::Error>>(text: &str, code: Code) -> Result<T, Refusal> {
    text.parse().map_err(|error: nwfilter_xml::Error| Refusal::new(code, error.to_string()))
}

// ---- what goes back to C ----

/// Fills a null-terminated list that libvirt frees. Without a list, the caller only wants the number.
fn hand_over<T>(
    list: *mut *mut *mut T,
    length: usize,
    handle: impl Fn(usize) -> *mut T,
) -> Result<c_int, Refusal> {
    if list.is_null() {
        return count(length);
    }
    let handles = pointers::<T>(length);
    if handles.is_null() {
        return Err(Refusal::new(Code::Internal, "out of memory"));
    }
    for index in 0..length {
        // SAFETY: there is room for `length` handles and the null pointer.
        unsafe { handles.add(index).write(handle(index)) };
    }
    // SAFETY: the caller's pointer is not null.
    unsafe { list.write(handles) };
    count(length)
}

/// A copy that libvirt frees.
fn duplicate(text: &str) -> *mut c_char {
    // SAFETY: the text ends with a zero byte.
    unsafe { libc::strdup(c_string(text).as_ptr()) }
}

fn count(number: usize) -> Result<c_int, Refusal> {
    c_int::try_from(number).map_err(|_| Refusal::new(Code::Internal, "the list is too long"))
}

fn validation(flags: c_uint) -> Result<Validation, Refusal> {
    no_flags(flags, VALIDATE)?;
    Ok(if flags & VALIDATE != 0 { Validation::Schema } else { Validation::Lenient })
}

/// Refuses flags that are not `known`.
fn no_flags(flags: c_uint, known: c_uint) -> Result<(), Refusal> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Refusal::new(Code::InvalidArg, format!("unsupported flags (0x{unknown:x})"))),
    }
}
