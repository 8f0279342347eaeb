//! The driver: opening it, changing what it holds, and asking it.

use std::ffi::{CStr, c_char};
use std::mem;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use nwfilter::explain::Question;
use nwfilter::xml::{read_binding, write_binding, write_filter};
use nwfilter::{Committed, Driver, Error, Host, Reconciler};

use crate::backend;
use crate::call::{self, Maker, call, no_report, put, report, room};
use crate::code::nwf_code;
use crate::error::{Failure, nwf_error};
use crate::event::nwf_event_queue;
use crate::input;
use crate::json;
use crate::options::{NWF_OPEN_WITHOUT_LEARNER, Options, nwf_backend, nwf_options};
use crate::text::nwf_text;
use crate::transaction::{Draft, filter_name, nwf_transaction, port_name};

/// A driver: filters and bindings on disk, and the kernel as they ask for. It belongs to the caller, who frees it with
/// nwf_driver_free. Threads may use it at the same time; those that change something at the same time share the work.
pub struct nwf_driver {
    maker: Maker,
    /// Ended before the driver is.
    reconciler: Mutex<Option<Reconciler>>,
    pub(crate) driver: Driver,
}

impl nwf_driver {
    /// What a handle of this process refers to.
    pub(crate) unsafe fn of<'a>(handle: *const Self) -> Result<&'a Self, Failure> {
        // SAFETY: the same contract.
        let driver = unsafe { input::handle(handle, "driver") }?;
        driver.maker.check()?;
        Ok(driver)
    }

    pub(crate) fn failed(&self, error: Error) -> Failure {
        Failure::of(&self.driver, error, &Draft::default().documents)
    }

    fn commit(&self, draft: &mut Draft) -> Result<Committed, Failure> {
        let transaction = mem::take(&mut draft.transaction);
        self.driver.commit(transaction).map_err(|error| Failure::of(&self.driver, error, &draft.documents))
    }

    /// Commits a transaction of one change, and reports it.
    pub(crate) unsafe fn alone(
        &self,
        change: impl FnOnce(&mut Draft) -> Result<(), Failure>,
        out: *mut *mut nwf_text,
    ) -> Result<(), Failure> {
        let mut draft = Draft::default();
        change(&mut draft)?;
        let committed = self.commit(&mut draft)?;
        // SAFETY: the same contract.
        unsafe { report(out, || json::committed(&committed, &draft)) };
        Ok(())
    }
}

/// Opens a driver. Null for `options` asks for all defaults. The stores are read; nothing is written, neither to disk nor
/// to the kernel. What the driver does later, it does in the network namespace of the thread that calls it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_open(
    options: *const nwf_options,
    driver: *mut *mut nwf_driver,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(driver, "the driver")?;
            let options = Options::read(options)?;
            let backend = backend::choose(&options)?;
            let mut builder = Driver::builder().config(options.config);
            if options.backend == nwf_backend::NWF_BACKEND_FAKE {
                builder = builder.host(Host::fake());
            }
            if options.flags & NWF_OPEN_WITHOUT_LEARNER != 0 {
                builder = builder.without_learner();
            }
            let opened = builder.open(backend).map_err(|error| Failure::Driver(Box::new(error), None))?;
            put(driver, nwf_driver { maker: Maker::this(), reconciler: Mutex::default(), driver: opened });
            Ok(())
        })
    }
}

/// Frees a driver; nothing if it is null. Its threads end, and its event queues close. The rules stay in the kernel. No
/// other call may use the driver meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_free(driver: *mut nwf_driver) {
    let drop_here = |driver: nwf_driver| {
        // A child has none of the threads that would have to end. Its copy of the driver ends with it.
        if driver.maker.is_this() { drop(driver) } else { mem::forget(driver) }
    };
    // SAFETY: by the contract of the header the handle is null, or valid and freed once.
    unsafe { call::free(driver, drop_here) }
}

/// What enforces the rules: "nftables", "xtables" or "fake". The text is part of the library. Null if the driver is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_backend(driver: *const nwf_driver) -> *const c_char {
    // SAFETY: by the contract of the header a handle is null or valid.
    let Some(driver) = (unsafe { driver.as_ref() }) else { return ptr::null() };
    let name: &CStr = match driver.driver.backend_name() {
        "nftables" => c"nftables",
        "xtables" => c"xtables",
        _ => c"fake",
    };
    name.as_ptr()
}

/// Puts a filter into the store, in place of one of its name, and updates the ports that use it, all or nothing. `document`
/// names the document in errors and may be null. `flags` is 0 or NWF_DEFINE_AS_LIBVIRT. `report` may be null; otherwise
/// it is set to what was done, as nwf_driver_commit does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_define(
    driver: *const nwf_driver,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    flags: u32,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let document = input::optional_text(document, document_length, "document")?.unwrap_or("filter");
            let xml = input::text(xml, xml_length, "xml")?;
            nwf_driver::of(driver)?.alone(|draft| draft.define(document, xml, flags), report)
        })
    }
}

/// Removes a filter from the store. Refused while a port uses it (NWF_FILTER_IN_USE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_undefine(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let name = input::text(name, name_length, "name")?;
            nwf_driver::of(driver)?.alone(|draft| draft.undefine(name), ptr::null_mut())
        })
    }
}

/// Every filter of the store and every stock filter, sorted by name, as JSON: [{"name", "uuid", "source": "store"|"stock"}].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_filters(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, json::filters) }
}

/// A filter in canonical form.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_filter_xml(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    xml: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(xml, "the XML")?;
            let driver = nwf_driver::of(driver)?;
            let name = filter_name(input::text(name, name_length, "name")?)?;
            let filter = driver.driver.filter(&name).map_err(|error| driver.failed(error))?;
            put(xml, nwf_text::new(write_filter(&filter)));
            Ok(())
        })
    }
}

/// Filters a port, which must have an interface (NWF_NO_SUCH_PORT) and no binding (NWF_BINDING_EXISTS). `document` names
/// the binding's document in errors and may be null. `report` may be null; otherwise it is set to what was done, as
/// nwf_driver_commit does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_bind(
    driver: *const nwf_driver,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let document = input::optional_text(document, document_length, "document")?.unwrap_or("binding");
            let xml = input::text(xml, xml_length, "xml")?;
            nwf_driver::of(driver)?.alone(|draft| draft.bind(document, xml), report)
        })
    }
}

/// Filters a port, whatever it had before: at every moment either the old rules or the new ones hold. If it has this very
/// binding already, only what the kernel lost of it is written. Else as nwf_driver_bind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_replace(
    driver: *const nwf_driver,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let document = input::optional_text(document, document_length, "document")?.unwrap_or("binding");
            let xml = input::text(xml, xml_length, "xml")?;
            nwf_driver::of(driver)?.alone(|draft| draft.replace(document, xml), report)
        })
    }
}

/// Stops filtering a port; no trace of it is left in the kernel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_unbind(
    driver: *const nwf_driver,
    port: *const c_char,
    port_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let port = input::text(port, port_length, "port")?;
            nwf_driver::of(driver)?.alone(|draft| draft.unbind(port), ptr::null_mut())
        })
    }
}

/// Every binding, sorted by port, and how far its port is from its filter, as JSON: [{"port", "filter", "mac",
/// "owner": {"name", "uuid"}, "address": {"state", …}}].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_bindings(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, json::bindings) }
}

/// The binding of a port in canonical form.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_binding_xml(
    driver: *const nwf_driver,
    port: *const c_char,
    port_length: usize,
    xml: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(xml, "the XML")?;
            let driver = nwf_driver::of(driver)?;
            let port = port_name(input::text(port, port_length, "port")?)?;
            let binding = driver.driver.binding(&port).map_err(|error| driver.failed(error))?;
            put(xml, nwf_text::new(write_binding(&binding)));
            Ok(())
        })
    }
}

/// Makes the changes of a transaction, or none of them. Whether it succeeds or not, the transaction has none left
/// afterwards, and can be filled again.
///
/// `report` may be null; otherwise it is set to what was done, as JSON: {"filters": [{"name", "uuid"}], "sets":
/// [{"name", "family", "entries": number, "includes": [name], "tags": [tag]}], "changed": [port], "changed_sets":
/// [name], "warnings": [text], "documents": [{"document", "code", "line", "column", "message", "help"}], "cut":
/// {"ended": [{"port", "protocol", "source", "destination", "ending": "forgotten"|"stalled"}], "failures": [text]}}.
/// "sets" has the sets that were defined or changed, "cut" what nwf_transaction_cut_connections asked for, "changed" the
/// ports whose rules were written, "warnings" what does not work although they were, "documents" what of the documents
/// is ignored or replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_commit(
    driver: *const nwf_driver,
    transaction: *mut nwf_transaction,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let driver = nwf_driver::of(driver)?;
            let mut draft = input::handle(transaction, "transaction")?.take()?;
            let committed = driver.commit(&mut draft)?;
            call::report(report, || json::committed(&committed, &draft));
            Ok(())
        })
    }
}

/// What a commit of the transaction would change, as JSON: {"stores": [text], "rules": [{"port", "table", "chain", "kind":
/// "missing"|"foreign", "rule", "origin"}], "warnings": [text]}. "missing" rules would be written, "foreign" ones removed.
/// Nothing is changed, and the transaction stays as it is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_plan(
    driver: *const nwf_driver,
    transaction: *const nwf_transaction,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(json, "the JSON")?;
            let driver = nwf_driver::of(driver)?;
            let draft = input::handle(transaction, "transaction")?.draft()?;
            let failed = |error| Failure::of(&driver.driver, error, &draft.documents);
            let preview = driver.driver.preview(&draft.transaction).map_err(failed)?;
            put(json, nwf_text::new(json::preview(&preview)));
            Ok(())
        })
    }
}

/// Brings the kernel to what the bindings ask for, such as after a start of the host. One failing port does not block the
/// others. `report` may be null; otherwise it is set to what was done, as JSON: {"changed": [port], "removed": [port],
/// "failed": [{"port", "filter", "fallback", "why"}], "failed_sets": [{"set", "why"}], "unbound": [port], "absent": [port],
/// "warnings": [text]}.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_reload(
    driver: *const nwf_driver,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let driver = nwf_driver::of(driver)?;
            let reloaded = driver.driver.reload().map_err(|error| driver.failed(error))?;
            call::report(report, || json::reloaded(&reloaded));
            Ok(())
        })
    }
}

/// How the kernel differs from what the bindings ask for, as JSON: {"differences": [{"port", "table", "chain", "kind",
/// "rule", "origin"}], "failed": […], "failed_sets": […], "unbound": [port], "absent": [port], "warnings": [text]}. Nothing is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_diff(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, |driver| Ok(json::drift(&driver.diff()?))) }
}

/// Filters, ports and the kernel at a glance, as JSON: {"backend", "filters": number, "stock_filters": number, "sets": number, "ports": as
/// nwf_driver_bindings, "problems": [text], "differences": number or null, "error": text or null}. Where the kernel
/// cannot be asked, "differences" is null and "error" says why.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_status(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, json::status) }
}

/// Which rule decides a packet of a port, and why, as JSON: docs/explain.md. `question` is the packet in words, such as
/// "in tcp from 192.0.2.7:40000 to :80 new"; one that is not understood is NWF_INVALID_QUESTION. No kernel is asked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_explain(
    driver: *const nwf_driver,
    port: *const c_char,
    port_length: usize,
    question: *const c_char,
    question_length: usize,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(json, "the JSON")?;
            let driver = nwf_driver::of(driver)?;
            let port = port_name(input::text(port, port_length, "port")?)?;
            let words: Vec<_> =
                input::text(question, question_length, "question")?.split_ascii_whitespace().collect();
            let port = driver.driver.explain(&port).map_err(|error| driver.failed(error))?;
            let asked = |error: &dyn std::fmt::Display| {
                Failure::Own(nwf_code::NWF_INVALID_QUESTION, error.to_string())
            };
            let Question { way, packet, connection } =
                Question::read(&port.guest(), &words).map_err(|error| asked(&error))?;
            let mut explainer = port.explainer();
            let explanation = match connection {
                Some(connection) => explainer.explain_as(way, &packet, connection),
                None => explainer.explain(way, &packet),
            };
            let explanation = explanation.map_err(|error| asked(&error))?;
            put(json, nwf_text::new(json::explanation(&port, way, &packet, &explanation)));
            Ok(())
        })
    }
}

/// The rules that a binding would have now, as JSON, without touching anything. `document` names the document in errors and
/// may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_ruleset(
    driver: *const nwf_driver,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(json, "the JSON")?;
            let driver = nwf_driver::of(driver)?;
            let document = input::optional_text(document, document_length, "document")?.unwrap_or("binding");
            let binding = read_binding(document, input::text(xml, xml_length, "xml")?).into_result()?;
            let ruleset = driver.driver.ruleset(&binding).map_err(|error| driver.failed(error))?;
            put(json, nwf_text::new(json::ruleset(&ruleset)));
            Ok(())
        })
    }
}

/// What every rule of a filter has counted for bound ports since it was written to the kernel, as JSON: {"rules": [{"rule":
/// "FILTER:LINE", "stops": whether it stops packets, "packets", "bytes", "ports": [port]}], "differing": [port]}.
/// "differing" has the ports of which the kernel does not hold all rules. Nothing is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_counters(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, |driver| Ok(json::counters(&driver.counters()?))) }
}

/// Numbers about a driver since it was opened, as a JSON object. Waits for nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_metrics(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, |driver| Ok(json::metrics(&driver.metrics()))) }
}

/// The same, and how many ports are in which state, as OpenMetrics text, which Prometheus and others read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_openmetrics(
    driver: *const nwf_driver,
    text: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, text, error, |driver| driver.openmetrics()) }
}

/// Follows what happens from here on: what this driver does, its learning of addresses and its repairs included, but not
/// what other processes do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_events(
    driver: *const nwf_driver,
    queue: *mut *mut nwf_event_queue,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(queue, "the queue")?;
            let driver = nwf_driver::of(driver)?;
            let events = driver.driver.event_queue().map_err(|error| driver.failed(error))?;
            put(queue, nwf_event_queue::new(events));
            Ok(())
        })
    }
}

/// Brings the kernel to what the bindings ask for, and keeps it there: a thread of the library repairs what others change,
/// until nwf_driver_stop_keeping or nwf_driver_free. NWF_ALREADY_KEEPING if one does so already.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_keep(driver: *const nwf_driver, error: *mut *mut nwf_error) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let driver = nwf_driver::of(driver)?;
            let mut reconciler = driver.reconciler.lock().unwrap_or_else(PoisonError::into_inner);
            if reconciler.is_some() {
                let what = "the driver is keeping the kernel already".to_owned();
                return Err(Failure::Own(nwf_code::NWF_ALREADY_KEEPING, what));
            }
            *reconciler = Some(driver.driver.keep().map_err(|error| driver.failed(error))?);
            Ok(())
        })
    }
}

/// Ends what nwf_driver_keep began; nothing if it did not. The rules stay. Waits for a repair that is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_stop_keeping(
    driver: *const nwf_driver,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let driver = nwf_driver::of(driver)?;
            let kept = driver.reconciler.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(kept);
            Ok(())
        })
    }
}

/// Answers a question that needs nothing but the driver.
pub(crate) unsafe fn answer(
    driver: *const nwf_driver,
    out: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
    ask: impl FnOnce(&Driver) -> Result<String, Error>,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(out, "the answer")?;
            let driver = nwf_driver::of(driver)?;
            put(out, nwf_text::new(ask(&driver.driver).map_err(|error| driver.failed(error))?));
            Ok(())
        })
    }
}
