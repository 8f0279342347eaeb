//! Transactions: changes that are made together or not at all.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nwfilter::Transaction;
use nwfilter::xml::{
    Binding, Diagnostics, Filter, FilterName, PortDev, Strictness, read_binding, read_filter_with,
};

use crate::call::{self, Maker, call};
use crate::code::nwf_code;
use crate::error::{Failure, nwf_error};
use crate::input;

/// For nwf_driver_define and nwf_transaction_define: takes rules with elements and attributes that do not exist, as libvirt
/// does. They then match more than is written.
pub const NWF_DEFINE_AS_LIBVIRT: u32 = 1;

/// Changes that nwf_driver_commit makes together or not at all. It belongs to the caller, who frees it with
/// nwf_transaction_free. Threads may add to it at the same time.
pub struct nwf_transaction {
    maker: Maker,
    draft: Mutex<Draft>,
}

/// What a transaction was given.
#[derive(Default)]
pub(crate) struct Draft {
    pub(crate) transaction: Transaction,
    pub(crate) length: usize,
    /// What the caller called the documents of filters.
    pub(crate) documents: BTreeMap<FilterName, String>,
    /// What of the documents is ignored or replaced.
    pub(crate) warnings: Vec<Diagnostics>,
}

impl Draft {
    pub(crate) fn define(&mut self, document: &str, text: &str, flags: u32) -> Result<(), Failure> {
        let strictness = match flags {
            0 => Strictness::Strict,
            NWF_DEFINE_AS_LIBVIRT => Strictness::AsLibvirt,
            other => return Err(Failure::argument(format!("flags has unknown bits: {other:#x}"))),
        };
        let reading = read_filter_with(document, text, strictness);
        self.warnings.extend(reading.warnings().filter(|found| !found.items.is_empty()).cloned());
        let filter: Filter = reading.into_result()?;
        self.documents.insert(filter.name.clone(), document.to_owned());
        self.transaction.define_filter(filter);
        self.length += 1;
        Ok(())
    }

    pub(crate) fn undefine(&mut self, name: &str) -> Result<(), Failure> {
        let name = filter_name(name)?;
        self.transaction.undefine_filter(&name);
        self.length += 1;
        Ok(())
    }

    pub(crate) fn bind(&mut self, document: &str, text: &str) -> Result<(), Failure> {
        let binding = self.binding(document, text)?;
        self.transaction.create_binding(binding);
        self.length += 1;
        Ok(())
    }

    pub(crate) fn replace(&mut self, document: &str, text: &str) -> Result<(), Failure> {
        let binding = self.binding(document, text)?;
        self.transaction.replace_binding(binding);
        self.length += 1;
        Ok(())
    }

    pub(crate) fn unbind(&mut self, port: &str) -> Result<(), Failure> {
        let port = port_name(port)?;
        self.transaction.delete_binding(&port);
        self.length += 1;
        Ok(())
    }

    fn binding(&mut self, document: &str, text: &str) -> Result<Binding, Failure> {
        let reading = read_binding(document, text);
        self.warnings.extend(reading.warnings().filter(|found| !found.items.is_empty()).cloned());
        Ok(reading.into_result()?)
    }
}

pub(crate) fn filter_name(text: &str) -> Result<FilterName, Failure> {
    text.parse().map_err(|error| Failure::Own(nwf_code::NWF_INVALID_NAME, format!("{error}")))
}

pub(crate) fn port_name(text: &str) -> Result<PortDev, Failure> {
    text.parse().map_err(|error| Failure::Own(nwf_code::NWF_INVALID_NAME, format!("{error}")))
}

impl nwf_transaction {
    pub(crate) fn draft(&self) -> Result<MutexGuard<'_, Draft>, Failure> {
        self.maker.check()?;
        // Whatever a panic left behind is a transaction all the same, and was not committed.
        Ok(self.draft.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The operations, of which none is left.
    pub(crate) fn take(&self) -> Result<Draft, Failure> {
        Ok(mem::take(&mut *self.draft()?))
    }
}

/// Makes a transaction without any change. It is never null.
#[unsafe(no_mangle)]
pub extern "C" fn nwf_transaction_new() -> *mut nwf_transaction {
    Box::into_raw(Box::new(nwf_transaction { maker: Maker::this(), draft: Mutex::default() }))
}

/// Adds: put a filter into the store, in place of one of its name, and update the ports that use it. The document is read
/// now, and refused now if it is not valid (NWF_INVALID_DOCUMENT). `document` names it in errors and may be null. `flags`
/// is 0 or NWF_DEFINE_AS_LIBVIRT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_define(
    transaction: *mut nwf_transaction,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    flags: u32,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let document = input::optional_text(document, document_length, "document")?;
            draft.define(document.unwrap_or("filter"), input::text(xml, xml_length, "xml")?, flags)
        })
    }
}

/// Adds: remove a filter from the store. A commit is refused while a port uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_undefine(
    transaction: *mut nwf_transaction,
    name: *const c_char,
    name_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            draft.undefine(input::text(name, name_length, "name")?)
        })
    }
}

/// Adds: filter a port, which must have an interface and no binding. The document is read now, and refused now if it is
/// not valid. `document` names it in errors and may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_bind(
    transaction: *mut nwf_transaction,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let document = input::optional_text(document, document_length, "document")?;
            draft.bind(document.unwrap_or("binding"), input::text(xml, xml_length, "xml")?)
        })
    }
}

/// The same for a port that may have a binding, which is replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_replace(
    transaction: *mut nwf_transaction,
    document: *const c_char,
    document_length: usize,
    xml: *const c_char,
    xml_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let document = input::optional_text(document, document_length, "document")?;
            draft.replace(document.unwrap_or("binding"), input::text(xml, xml_length, "xml")?)
        })
    }
}

/// Adds: stop filtering a port.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_unbind(
    transaction: *mut nwf_transaction,
    port: *const c_char,
    port_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            draft.unbind(input::text(port, port_length, "port")?)
        })
    }
}

/// How many changes a transaction has; 0 if it is null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_length(transaction: *const nwf_transaction) -> usize {
    // SAFETY: by the contract of the header a handle is null or valid.
    let transaction = unsafe { transaction.as_ref() };
    transaction.and_then(|transaction| Some(transaction.draft().ok()?.length)).unwrap_or(0)
}

/// Frees a transaction; nothing if it is null. Changes that were not committed are not made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_free(transaction: *mut nwf_transaction) {
    // SAFETY: by the contract of the header the handle is null, or valid and freed once.
    unsafe { call::free(transaction, drop) }
}
