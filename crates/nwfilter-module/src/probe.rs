//! Checks that libvirt calls the functions of the driver's tables. Before the driver serves any client, each public
//! function of libvirt is called once on a connection made for this.
//!
//! The layout of the tables is private to libvirt and may change in a newer one, which would then call a wrong function.
//! During the probe, a function only records that it was called.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_uchar, c_uint};
use std::ptr::null_mut;

use crate::abi::{
    AskConnect, CloseConnect, Connect, FreeBinding, FreeFilter, GetNwFilter, GetNwFilterBinding,
    HYPERVISOR_SLOTS, HypervisorDriver, NwFilter, NwFilterBinding,
};
use crate::libvirt::{LoadError, symbol};

/// A function of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    ConnectOpen,
    ConnectClose,
    NumOfFilters,
    ListFilters,
    ListAllFilters,
    LookupByName,
    LookupByUuid,
    DefineXml,
    DefineXmlFlags,
    Undefine,
    GetXmlDesc,
    ListAllBindings,
    BindingLookup,
    BindingCreate,
    BindingDelete,
    BindingGetXmlDesc,
}

thread_local! {
    static PROBING: Cell<bool> = const { Cell::new(false) };
    static CALLED: RefCell<Vec<Slot>> = const { RefCell::new(Vec::new()) };
}

/// Whether a call is one of the probe's, which is then recorded. Its arguments must not be used.
pub(crate) fn notes(slot: Slot) -> bool {
    let probing = PROBING.get();
    if probing {
        CALLED.with_borrow_mut(|called| called.push(slot));
    }
    probing
}

type List<T> = unsafe extern "C" fn(*mut Connect, *mut *mut *mut T, c_uint) -> c_int;
type ByText<T> = unsafe extern "C" fn(*mut Connect, *const c_char) -> *mut T;
type ByTextWithFlags<T> = unsafe extern "C" fn(*mut Connect, *const c_char, c_uint) -> *mut T;
type Describe<T> = unsafe extern "C" fn(*mut T, c_uint) -> *mut c_char;
type Remove<T> = unsafe extern "C" fn(*mut T) -> c_int;
type Ask = unsafe extern "C" fn(*mut Connect) -> c_int;
type ListNames = unsafe extern "C" fn(*mut Connect, *mut *mut c_char, c_int) -> c_int;
type ByUuid = unsafe extern "C" fn(*mut Connect, *const c_uchar) -> *mut NwFilter;
type Open = unsafe extern "C" fn(*const c_char) -> *mut Connect;
type ResetLastError = unsafe extern "C" fn();

/// Checks that every public function calls the right function of the tables, and places the functions that answer
/// questions about a connection where this libvirt looks for them.
///
/// # Safety
///
/// `driver` is the registered table, and no other thread uses it yet.
pub(crate) unsafe fn check(driver: *mut HypervisorDriver) -> Result<(), LoadError> {
    let open = symbol!("virConnectOpen" as Open);
    let close = symbol!("virConnectClose" as CloseConnect);
    let reset = symbol!("virResetLastError" as ResetLastError);
    PROBING.set(true);
    let mut probe = Probe(null_mut());
    let opened = expect(Slot::ConnectOpen, || {
        // SAFETY: the URI lives through the call.
        probe.0 = unsafe { open(c"nwfilter:///system".as_ptr()) };
    });
    let opened = opened
        .and_then(|()| if probe.0.is_null() { Err(LoadError::Refused("virConnectOpen")) } else { Ok(()) });
    let checked = opened.and_then(|()| {
        let checked = probe.functions();
        // SAFETY: the driver is nobody else's yet.
        unsafe { probe.place_others(driver) }?;
        let closed = expect(Slot::ConnectClose, || {
            // SAFETY: the connection was opened above and is not used any more.
            let _ = unsafe { close(probe.0) };
        });
        checked.and(closed)
    });
    PROBING.set(false);
    // SAFETY: it only clears what the calls above have left in this thread.
    unsafe { reset() };
    checked
}

/// Calls a function of libvirt, which must call the function of `slot`.
fn expect(slot: Slot, call: impl FnOnce()) -> Result<(), LoadError> {
    CALLED.take();
    call();
    let called = CALLED.take();
    if called == [slot] { Ok(()) } else { Err(LoadError::Misplaced { slot, called }) }
}

/// Calls a function of libvirt by its name, which must call the function of a slot.
macro_rules! arrives {
    ($name:literal as $type:ty, $($argument:expr),+ => $slot:ident) => {{
        let function = symbol!($name as $type);
        expect(Slot::$slot, || {
            // SAFETY: the arguments are of the function's types and live through the call; ours reads none.
            let _ = unsafe { function($($argument),+) };
        })
    }};
}

/// A connection to this driver.
struct Probe(*mut Connect);

impl Probe {
    fn functions(&self) -> Result<(), LoadError> {
        let (connect, text, uuid) = (self.0, c"probe".as_ptr(), [0; 16]);
        let mut names = [null_mut(); 1];
        let (mut filters, mut bindings) = (null_mut(), null_mut());

        arrives!("virConnectNumOfNWFilters" as Ask, connect => NumOfFilters)?;
        arrives!("virConnectListNWFilters" as ListNames, connect, names.as_mut_ptr(), 1 => ListFilters)?;
        arrives!("virConnectListAllNWFilters" as List<NwFilter>, connect, &raw mut filters, 0 => ListAllFilters)?;
        arrives!("virNWFilterLookupByName" as ByText<NwFilter>, connect, text => LookupByName)?;
        arrives!("virNWFilterLookupByUUID" as ByUuid, connect, uuid.as_ptr() => LookupByUuid)?;
        arrives!("virNWFilterDefineXML" as ByText<NwFilter>, connect, text => DefineXml)?;
        arrives!("virNWFilterDefineXMLFlags" as ByTextWithFlags<NwFilter>, connect, text, 0 => DefineXmlFlags)?;
        arrives!("virConnectListAllNWFilterBindings" as List<NwFilterBinding>, connect, &raw mut bindings, 0
            => ListAllBindings)?;
        arrives!("virNWFilterBindingLookupByPortDev" as ByText<NwFilterBinding>, connect, text => BindingLookup)?;
        arrives!("virNWFilterBindingCreateXML" as ByTextWithFlags<NwFilterBinding>, connect, text, 0
            => BindingCreate)?;
        self.of_a_filter()?;
        self.of_a_binding()
    }

    fn of_a_filter(&self) -> Result<(), LoadError> {
        let get = symbol!("virGetNWFilter" as GetNwFilter);
        let free = symbol!("virNWFilterFree" as FreeFilter);
        // SAFETY: the connection is open, and libvirt copies name and UUID.
        let filter = unsafe { get(self.0, c"probe".as_ptr(), [0; 16].as_ptr()) };
        if filter.is_null() {
            return Err(LoadError::Handles);
        }
        let described = arrives!("virNWFilterGetXMLDesc" as Describe<NwFilter>, filter, 0 => GetXmlDesc);
        let removed = arrives!("virNWFilterUndefine" as Remove<NwFilter>, filter => Undefine);
        // SAFETY: the handle was made above and is not used any more.
        unsafe { free(filter) };
        described.and(removed)
    }

    fn of_a_binding(&self) -> Result<(), LoadError> {
        let get = symbol!("virGetNWFilterBinding" as GetNwFilterBinding);
        let free = symbol!("virNWFilterBindingFree" as FreeBinding);
        // SAFETY: the connection is open, and libvirt copies both names.
        let binding = unsafe { get(self.0, c"probe".as_ptr(), c"probe".as_ptr()) };
        if binding.is_null() {
            return Err(LoadError::Handles);
        }
        let described = arrives!("virNWFilterBindingGetXMLDesc" as Describe<NwFilterBinding>, binding, 0
            => BindingGetXmlDesc);
        let removed =
            arrives!("virNWFilterBindingDelete" as Remove<NwFilterBinding>, binding => BindingDelete);
        // SAFETY: the handle was made above and is not used any more.
        unsafe { free(binding) };
        described.and(removed)
    }

    /// Places the functions that answer questions about a connection.
    ///
    /// # Safety
    ///
    /// `driver` is the table of the connection's driver, and no other thread uses it yet.
    unsafe fn place_others(&self, driver: *mut HypervisorDriver) -> Result<(), LoadError> {
        let asked: [(Ask, AskConnect); 3] = [
            // Within the daemon.
            (symbol!("virConnectIsSecure" as Ask), yes),
            // This driver does not transport data between daemon and client.
            (symbol!("virConnectIsEncrypted" as Ask), no),
            (symbol!("virConnectIsAlive" as Ask), yes),
        ];
        let places = asked.map(|(ask, answer)| {
            // SAFETY: the caller's driver.
            (unsafe { self.place_of(driver, ask) }, answer)
        });
        let mut others = [None; HYPERVISOR_SLOTS];
        for (place, answer) in places {
            if let Some(slot) = place.and_then(|place| others.get_mut(place)) {
                *slot = Some(answer);
            }
        }
        // SAFETY: the caller's driver.
        unsafe { (&raw mut (*driver).others).write(others) };
        Ok(())
    }

    /// Finds the place from which a function of libvirt takes the driver's function. It returns that function's result, so
    /// all places are filled with functions that return one bit of their own index, once for each bit.
    ///
    /// # Safety
    ///
    /// As [`Probe::place_others`].
    unsafe fn place_of(&self, driver: *mut HypervisorDriver, ask: Ask) -> Option<usize> {
        let mut place = 0;
        for bit in 0..HYPERVISOR_SLOTS.ilog2() {
            let says = |place: usize| Some(if place >> bit & 1 == 1 { yes as AskConnect } else { no });
            // SAFETY: the caller's driver.
            unsafe { (&raw mut (*driver).others).write(std::array::from_fn(says)) };
            // SAFETY: the connection is open.
            match unsafe { ask(self.0) } {
                0 => {}
                1 => place |= 1 << bit,
                _ => return None,
            }
        }
        Some(place)
    }
}

extern "C" fn yes(_: *mut Connect) -> c_int {
    1
}

extern "C" fn no(_: *mut Connect) -> c_int {
    0
}
