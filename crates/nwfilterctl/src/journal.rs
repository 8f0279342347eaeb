//! The log of a program that the service manager started: in the journal, with the fields of each message.
//!
//! A message about a port has the fields NWFILTER_PORT and, where they are known, NWFILTER_GUEST and NWFILTER_FILTER.

use env_logger::Logger;
use log::{Log, Metadata, Record};
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Logs what `logger` lets through: to the journal if stderr is that, else as `logger` does. A second call has no effect.
pub(crate) fn start(logger: Logger) {
    let level = logger.filter();
    let journal = if connected_to_journal() { JournalLog::new().ok() } else { None };
    let logger: Box<dyn Log> = match journal {
        Some(journal) => Box::new(Journal { journal, logger }),
        None => Box::new(logger),
    };
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

struct Journal {
    journal: JournalLog,
    /// Decides what is logged.
    logger: Logger,
}

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.logger.matches(record) {
            self.journal.log(record);
        }
    }

    fn flush(&self) {}
}
