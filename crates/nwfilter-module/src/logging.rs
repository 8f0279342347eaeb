//! Forwards the driver's log to libvirt's, so that libvirt's `log_filters` and `log_outputs` apply to it.

use std::ffi::{CString, c_int};
use std::ptr::null;
use std::sync::OnceLock;

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::abi::{LogMessage, LogMetadata, LogSource};
use crate::libvirt::c_string;

struct ToLibvirt;

static LOG_MESSAGE: OnceLock<LogMessage> = OnceLock::new();

/// Starts to forward the log.
pub(crate) fn init(log_message: LogMessage) {
    let first = LOG_MESSAGE.set(log_message).is_ok();
    if first && log::set_logger(&ToLibvirt).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// Sends no more than what a setting says, where there is one; libvirt's log filters apply beside it.
pub(crate) fn limit(level: Option<&str>) {
    if let Some(level) = level.and_then(|level| level.parse().ok()) {
        log::set_max_level(level);
    }
}

/// Whether the log is forwarded.
pub(crate) fn is_ready() -> bool {
    LOG_MESSAGE.get().is_some()
}

impl Log for ToLibvirt {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let Some(log_message) = LOG_MESSAGE.get() else { return };
        let file = c_string(record.file().unwrap_or("nwfilter"));
        let line = record.line().and_then(|line| c_int::try_from(line).ok()).unwrap_or(0);
        let function = c_string(record.target());
        let message = c_string(&record.args().to_string());
        let mut fields = Fields::default();
        // It fails only if a visitor does.
        let _ = record.key_values().visit(&mut fields);
        let metadata = fields.metadata();
        // SAFETY: the source lives for ever and libvirt changes it under its own lock; the strings and the
        // metadata, which a key of null ends, live through the call; the format takes exactly one string.
        unsafe {
            log_message(
                source(),
                priority(record.level()),
                file.as_ptr(),
                line,
                function.as_ptr(),
                metadata.as_ptr(),
                c"%s".as_ptr(),
                message.as_ptr(),
            );
        }
    }

    fn flush(&self) {}
}

/// The fields of a message for libvirt's journal, such as NWFILTER_PORT.
#[derive(Default)]
struct Fields(Vec<[CString; 2]>);

impl Fields {
    /// The same in libvirt's layout, ended by a null key. It is valid as long as the fields are.
    fn metadata(&self) -> Vec<LogMetadata> {
        let fields = self.0.iter().map(|[key, text]| (key.as_ptr(), text.as_ptr()));
        let end = (null(), null());
        fields.chain([end]).map(|(key, text)| LogMetadata { key, text, number: 0 }).collect()
    }
}

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        self.0.push([c_string(&key.as_str().to_ascii_uppercase()), c_string(&value.to_string())]);
        Ok(())
    }
}

/// virLogPriority
fn priority(level: Level) -> c_int {
    match level {
        Level::Error => 4,
        Level::Warn => 3,
        Level::Info => 2,
        Level::Debug | Level::Trace => 1,
    }
}

/// The source that libvirt matches log filters with. It has the name of libvirt's own driver, so that existing log filters
/// keep working.
fn source() -> *mut LogSource {
    struct Shared(*mut LogSource);
    // SAFETY: the pointer is only handed to libvirt, which locks what it does with it.
    unsafe impl Send for Shared {}
    // SAFETY: as above.
    unsafe impl Sync for Shared {}
    static SOURCE: OnceLock<Shared> = OnceLock::new();
    let made = || {
        let source = LogSource { name: c"nwfilter.nwfilter_driver".as_ptr(), state: [0; 14] };
        Shared(Box::leak(Box::new(source)))
    };
    SOURCE.get_or_init(made).0
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn fields_of_a_message_are_those_of_the_journal() {
        let mut fields = Fields::default();
        let record = [("nwfilter_port", "vnet0"), ("nwfilter_filter", "web")];
        kv::Source::visit(&record, &mut fields).unwrap();
        let metadata = fields.metadata();
        // SAFETY: the texts are those of the fields.
        let text = |text| unsafe { CStr::from_ptr(text) }.to_str().unwrap();
        let (last, shown) = metadata.split_last().unwrap();
        let shown: Vec<_> = shown.iter().map(|field| (text(field.key), text(field.text))).collect();
        assert_eq!(shown, [("NWFILTER_PORT", "vnet0"), ("NWFILTER_FILTER", "web")]);
        assert!(last.key.is_null());
    }
}
