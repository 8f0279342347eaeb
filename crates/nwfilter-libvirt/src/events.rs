//! libvirt's events. This is the only module that calls virt-sys, for functions that the crate virt does not wrap.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nwfilter_xml::Uuid;
use virt::connect::Connect;
use virt::error::{Error, ErrorNumber};
use virt_sys as sys;

/// Keep-alive of an idle connection: the interval in seconds, and how many answers may be missing.
const KEEP_ALIVE: (i32, u32) = (5, 5);

/// A message to the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A domain may have changed.
    Domain(Uuid),
    /// The connection with this number is lost.
    Closed(u64),
    /// The listener must end.
    Stop,
}

/// A connection whose events are sent to a listener.
pub(crate) struct Connection {
    connect: Connect,
    callbacks: Vec<c_int>,
    number: u64,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{}", .0.message())]
    Libvirt(#[from] Error),
    #[error("the thread for libvirt's events cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// The argument of every callback.
struct Context {
    sender: Sender<Event>,
    number: u64,
}

impl Connection {
    /// Connects and registers for the events.
    pub(crate) fn open(uri: Option<&str>, number: u64, sender: &Sender<Event>) -> Result<Self, OpenError> {
        start_event_loop()?;
        let connect = Connect::open(uri)?;
        // Only connections to a daemon have it.
        let _ = connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1);
        let mut connection = Self { connect, callbacks: Vec::new(), number };
        connection.register_close(sender)?;
        connection.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle(), sender)?;
        for event in [sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED] {
            connection.register(event, device(), sender)?;
        }
        connection.register(sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, metadata(), sender)?;
        Ok(connection)
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// All domains, each with its XML if it runs.
    pub(crate) fn domains(&self) -> Result<Vec<(Uuid, Option<String>)>, Error> {
        let mut domains = Vec::new();
        for domain in self.connect.list_all_domains(0)? {
            let uuid = domain.uuid()?;
            match running_xml(&domain) {
                Ok(xml) => domains.push((uuid, xml)),
                Err(error) if is_gone(&error) => domains.push((uuid, None)),
                Err(error) => return Err(error),
            }
        }
        Ok(domains)
    }

    /// A domain's XML, if it runs.
    pub(crate) fn domain(&self, uuid: Uuid) -> Result<Option<String>, Error> {
        let domain = self.connect.lookup_domain_by_uuid(uuid);
        match domain.and_then(|domain| running_xml(&domain)) {
            Err(error) if is_gone(&error) => Ok(None),
            result => result,
        }
    }

    fn register_close(&self, sender: &Sender<Event>) -> Result<(), Error> {
        let context = Context::leak(sender, self.number);
        // SAFETY: the callback has the type that libvirt wants, and libvirt gives the context back to `free`.
        let result = unsafe {
            let connect = self.connect.as_ptr();
            sys::virConnectRegisterCloseCallback(connect, Some(on_close), context, Some(free))
        };
        if result < 0 {
            // SAFETY: libvirt did not take the context.
            unsafe { free(context) };
            let error = Error::last_error();
            // A driver inside this process has no connection that could be lost.
            return if error.code() == ErrorNumber::NoSupport.into() { Ok(()) } else { Err(error) };
        }
        Ok(())
    }

    fn register(
        &mut self,
        event: sys::virDomainEventID,
        callback: sys::virConnectDomainEventGenericCallback,
        sender: &Sender<Event>,
    ) -> Result<(), Error> {
        let context = Context::leak(sender, self.number);
        // SAFETY: the callback is that of the event, and libvirt gives the context back to `free`.
        let id = unsafe {
            let connect = self.connect.as_ptr();
            sys::virConnectDomainEventRegisterAny(
                connect,
                null_mut(),
                event as c_int,
                callback,
                context,
                Some(free),
            )
        };
        if id < 0 {
            // SAFETY: libvirt did not take the context.
            unsafe { free(context) };
            return Err(Error::last_error());
        }
        self.callbacks.push(id);
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for id in &self.callbacks {
            // SAFETY: the connection lives until after this, and the number was given by it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), *id) };
        }
        // SAFETY: as above; if there is no such callback, nothing happens.
        unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
    }
}

impl Context {
    fn leak(sender: &Sender<Event>, number: u64) -> *mut c_void {
        Box::into_raw(Box::new(Context { sender: sender.clone(), number })).cast()
    }

    /// SAFETY: `opaque` must come from [`Context::leak`] and not be freed yet.
    unsafe fn send(opaque: *mut c_void, event: impl FnOnce(&Context) -> Option<Event>) {
        // SAFETY: as the caller says.
        let context = unsafe { &*opaque.cast::<Context>() };
        if let Some(event) = event(context) {
            // The listener has ended.
            let _ = context.sender.send(event);
        }
    }
}

unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: libvirt calls this once for each context that was leaked.
    drop(unsafe { Box::from_raw(opaque.cast::<Context>()) });
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt calls this with the context of the registration.
    unsafe { Context::send(opaque, |context| Some(Event::Closed(context.number))) };
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: c_int,
    _: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt calls this with the context of the registration and a domain that lives through the call.
    unsafe { Context::send(opaque, |_| uuid(domain).map(Event::Domain)) };
    0
}

unsafe extern "C" fn on_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: *const std::ffi::c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as for on_lifecycle.
    unsafe { Context::send(opaque, |_| uuid(domain).map(Event::Domain)) };
}

unsafe extern "C" fn on_metadata(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: c_int,
    _: *const std::ffi::c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as for on_lifecycle.
    unsafe { Context::send(opaque, |_| uuid(domain).map(Event::Domain)) };
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

fn lifecycle() -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: libvirt calls the callback of a lifecycle event with the arguments that `on_lifecycle` has.
    Some(unsafe { std::mem::transmute::<*const (), Generic>(on_lifecycle as *const ()) })
}

fn device() -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: libvirt calls the callback of a device event with the arguments that `on_device` has.
    Some(unsafe { std::mem::transmute::<*const (), Generic>(on_device as *const ()) })
}

fn metadata() -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: libvirt calls the callback of a metadata event with the arguments that `on_metadata` has.
    Some(unsafe { std::mem::transmute::<*const (), Generic>(on_metadata as *const ()) })
}

/// SAFETY: the domain must be valid.
unsafe fn uuid(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0; 16];
    // SAFETY: the domain is valid, and a UUID has 16 bytes.
    let result = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (result == 0).then(|| Uuid::from_bytes(bytes))
}

fn running_xml(domain: &virt::domain::Domain) -> Result<Option<String>, Error> {
    if domain.is_active()? { domain.xml_desc(0).map(Some) } else { Ok(None) }
}

/// Whether the domain was undefined or ended between two calls.
fn is_gone(error: &Error) -> bool {
    [ErrorNumber::NoDomain, ErrorNumber::OperationInvalid].iter().any(|gone| error.code() == (*gone).into())
}

/// Starts the process's thread for libvirt's events, once.
fn start_event_loop() -> Result<(), OpenError> {
    static STARTED: Mutex<bool> = Mutex::new(false);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    if *started {
        return Ok(());
    }
    virt::error::clear_error_callback();
    // SAFETY: it is called before the first connection; again only if there was no thread, and then does nothing new.
    if unsafe { sys::virEventRegisterDefaultImpl() } < 0 {
        return Err(Error::last_error().into());
    }
    std::thread::Builder::new().spawn(|| {
        loop {
            // SAFETY: the implementation is registered, and only this thread runs it.
            if unsafe { sys::virEventRunDefaultImpl() } < 0 {
                log::error!("libvirt's event loop: {}", Error::last_error().message());
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    })?;
    *started = true;
    Ok(())
}
