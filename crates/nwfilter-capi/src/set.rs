//! Sets: groups of addresses that filters share, and that change without a rule.

use std::ffi::c_char;
use std::ptr;

use nwfilter::xml::{FilterSet, SetEntry, SetFamily, SetName, SetRange, read_set, write_set};

use crate::call::{call, no_report, put, room};
use crate::code::nwf_code;
use crate::driver::{answer, nwf_driver};
use crate::error::{Failure, nwf_error};
use crate::input;
use crate::json;
use crate::text::nwf_text;
use crate::transaction::{Draft, nwf_transaction};

impl Draft {
    fn define_set(&mut self, document: &str, text: &str) -> Result<(), Failure> {
        self.transaction.define_set(read_set(document, text).into_result()?);
        self.length += 1;
        Ok(())
    }

    fn undefine_set(&mut self, name: &str) -> Result<(), Failure> {
        self.transaction.undefine_set(&set_name(name)?);
        self.length += 1;
        Ok(())
    }

    fn add_to_set(&mut self, name: &str, entries: &str) -> Result<(), Failure> {
        self.transaction.add_to_set(&set_name(name)?, read_entries(entries)?);
        self.length += 1;
        Ok(())
    }

    fn remove_from_set(&mut self, name: &str, entries: &str) -> Result<(), Failure> {
        let ranges = read_entries(entries)?.into_iter().map(|entry| entry.range);
        self.transaction.remove_from_set(&set_name(name)?, ranges.collect());
        self.length += 1;
        Ok(())
    }

    fn replace_in_set(&mut self, name: &str, entries: &str) -> Result<(), Failure> {
        self.transaction.replace_in_set(&set_name(name)?, read_entries(entries)?);
        self.length += 1;
        Ok(())
    }
}

fn set_name(text: &str) -> Result<SetName, Failure> {
    text.parse().map_err(|error| Failure::Own(nwf_code::NWF_INVALID_NAME, format!("{error}")))
}

/// Entries, one a line. Their family is that of the first: no text is an entry of two families.
fn read_entries(text: &str) -> Result<Vec<SetEntry>, Failure> {
    let values = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let Some(first) = values.clone().find(|value| !value.is_empty()) else { return Ok(Vec::new()) };
    let families = SetFamily::NAMES.map(|(family, _)| family);
    let Some(family) = families.into_iter().find(|family| SetRange::parse(*family, first).is_ok()) else {
        let line = values.take_while(|value| value.is_empty()).count() + 1;
        let why = format!("entries:{line}: '{first}' is no address, network, range, MAC address or port");
        return Err(Failure::Own(nwf_code::NWF_INVALID_SET, why));
    };
    FilterSet::read_entries(family, "entries", text)
        .map_err(|error| Failure::Own(nwf_code::NWF_INVALID_SET, error.to_string()))
}

/// Puts a set into the store, in place of one of its name, and what it holds into the kernel: a document <filterset>. `document`
/// names it in errors and may be null. `report` may be null; otherwise it is set to what was done, as nwf_driver_commit does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_define_set(
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
            let document = input::optional_text(document, document_length, "document")?.unwrap_or("set");
            let xml = input::text(xml, xml_length, "xml")?;
            nwf_driver::of(driver)?.alone(|draft| draft.define_set(document, xml), report)
        })
    }
}

/// Removes a set from the store and from the kernel. Refused while a filter, another set or a port uses it (NWF_SET_IN_USE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_undefine_set(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let name = input::text(name, name_length, "name")?;
            nwf_driver::of(driver)?.alone(|draft| draft.undefine_set(name), ptr::null_mut())
        })
    }
}

/// Adds entries to a set, all or none: one a line, such as 10.0.0.0/24, each with a comment behind # if there is one.
/// `report` is as of nwf_driver_commit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_add_to_set(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let name = input::text(name, name_length, "name")?;
            let entries = input::text(entries, entries_length, "entries")?;
            nwf_driver::of(driver)?.alone(|draft| draft.add_to_set(name, entries), report)
        })
    }
}

/// Takes entries out of a set, all or none, one a line. Each must be an entry of the set itself. `report` is as of
/// nwf_driver_commit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_remove_from_set(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let name = input::text(name, name_length, "name")?;
            let entries = input::text(entries, entries_length, "entries")?;
            nwf_driver::of(driver)?.alone(|draft| draft.remove_from_set(name, entries), report)
        })
    }
}

/// Puts entries, one a line, in the place of all entries of a set. Its includes and tags stay. `report` is as of
/// nwf_driver_commit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_replace_in_set(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    report: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            no_report(report);
            let name = input::text(name, name_length, "name")?;
            let entries = input::text(entries, entries_length, "entries")?;
            nwf_driver::of(driver)?.alone(|draft| draft.replace_in_set(name, entries), report)
        })
    }
}

/// Every set, sorted by name, as JSON: [{"name", "family": "ipv4"|"ipv6"|"mac"|"port", "entries": number, "includes": [name],
/// "tags": [tag]}].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_sets(
    driver: *const nwf_driver,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe { answer(driver, json, error, json::sets) }
}

/// A set in canonical form.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_set_xml(
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
            let name = set_name(input::text(name, name_length, "name")?)?;
            let set = driver.driver.set(&name).map_err(|error| driver.failed(error))?;
            put(xml, nwf_text::new(write_set(&set)));
            Ok(())
        })
    }
}

/// All that a set holds, its includes and the known addresses of its tags' ports among it, as JSON: [text].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_driver_set_content(
    driver: *const nwf_driver,
    name: *const c_char,
    name_length: usize,
    json: *mut *mut nwf_text,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            room(json, "the JSON")?;
            let driver = nwf_driver::of(driver)?;
            let name = set_name(input::text(name, name_length, "name")?)?;
            let content = driver.driver.set_content(&name).map_err(|error| driver.failed(error))?;
            put(json, nwf_text::new(json::content(&content)));
            Ok(())
        })
    }
}

/// Adds: put a set into the store, in place of one of its name. The document is read now, and refused now if it is not valid.
/// `document` names it in errors and may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_define_set(
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
            draft.define_set(document.unwrap_or("set"), input::text(xml, xml_length, "xml")?)
        })
    }
}

/// Adds: remove a set. A commit is refused while a filter, another set or a port uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_undefine_set(
    transaction: *mut nwf_transaction,
    name: *const c_char,
    name_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            draft.undefine_set(input::text(name, name_length, "name")?)
        })
    }
}

/// Adds: add entries to a set, one a line.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_add_to_set(
    transaction: *mut nwf_transaction,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let name = input::text(name, name_length, "name")?;
            draft.add_to_set(name, input::text(entries, entries_length, "entries")?)
        })
    }
}

/// Adds: take entries out of a set, one a line.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_remove_from_set(
    transaction: *mut nwf_transaction,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let name = input::text(name, name_length, "name")?;
            draft.remove_from_set(name, input::text(entries, entries_length, "entries")?)
        })
    }
}

/// Adds: put entries, one a line, in the place of all entries of a set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_replace_in_set(
    transaction: *mut nwf_transaction,
    name: *const c_char,
    name_length: usize,
    entries: *const c_char,
    entries_length: usize,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            let mut draft = input::handle(transaction, "transaction")?.draft()?;
            let name = input::text(name, name_length, "name")?;
            draft.replace_in_set(name, input::text(entries, entries_length, "entries")?)
        })
    }
}

/// Has the commit also end the connections of the ports concerned that could not begin by the new rules. The report of the
/// commit says which were ended, as "cut".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nwf_transaction_cut_connections(
    transaction: *mut nwf_transaction,
    error: *mut *mut nwf_error,
) -> nwf_code {
    // SAFETY: the caller keeps the contract of the header.
    unsafe {
        call(error, || {
            input::handle(transaction, "transaction")?.draft()?.transaction.cut_connections();
            Ok(())
        })
    }
}
