//! What the tables hold, remembered for as long as the kernel says that nothing has changed.
//!
//! The save tools take a second and more for the rules of a thousand ports; asking for the generation of the rules
//! takes microseconds.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::thread;

use nwfilter_rules::ApplyError;

use crate::nftables::generation;
use crate::saved::{Saved, SavedTable};
use crate::steps::Step;
use crate::tool::{self, TableId, Tool};

/// The tables that hold rules of ours.
pub(crate) type Tables = BTreeMap<TableId, SavedTable>;

/// The tables as they were when they were last read or written.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    tables: Tables,
    /// The state in which the kernel has them; `None` where they have to be read anew.
    state: Option<State>,
}

/// What tells whether tables are still what they were: the network namespace, by device and inode, and the generation
/// of its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    namespace: (u64, u64),
    generation: u32,
}

impl Memory {
    /// The tables as they are in the network namespace of the calling thread.
    pub(crate) fn tables(&mut self) -> Result<&Tables, ApplyError> {
        let before = state();
        if before.is_none() || before != self.state {
            self.state = None;
            self.tables = read()?;
            // The legacy variants do not count their changes.
            let counted = !Tool::ALL.into_iter().any(|tool| tool::is_legacy(tool).unwrap_or(true));
            // What was changed while the tools read is read again next time.
            self.state = before.filter(|before| counted && state() == Some(*before));
        }
        Ok(&self.tables)
    }

    /// Takes note of steps that were committed to the tables of the last call of [`Self::tables`]. If anybody else
    /// changed anything meanwhile, the tables are read anew next time.
    pub(crate) fn committed(&mut self, steps: &[Step]) {
        let Some(known) = &mut self.state else { return };
        // Each table that a restore tool changes is a transaction, and each transaction a generation.
        let commits = u32::try_from(steps.iter().map(Vec::len).sum::<usize>()).unwrap_or(u32::MAX);
        known.generation = known.generation.wrapping_add(commits);
        if state() != Some(*known) {
            self.state = None;
            return;
        }
        for plan in steps.iter().flatten() {
            plan.carry_out(self.tables.entry(plan.table()).or_default());
        }
    }

    /// Reads the tables anew next time.
    pub(crate) fn forget(&mut self) {
        self.state = None;
    }
}

/// `None` where the kernel does not tell.
fn state() -> Option<State> {
    let namespace = std::fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(State { namespace: (namespace.dev(), namespace.ino()), generation: generation().ok()? })
}

/// Asks all tools at the same time, each in the network namespace of the calling thread.
fn read() -> Result<Tables, ApplyError> {
    let texts = thread::scope(|scope| {
        let readers = Tool::ALL.map(|tool| (tool, scope.spawn(move || tool::save(tool))));
        readers.map(|(tool, reader)| (tool, reader.join().unwrap_or_else(|panic| resume_unwind(panic))))
    });
    let mut tables = Tables::new();
    for (tool, text) in texts {
        let mut saved = Saved::parse(&text?);
        for table in TableId::ALL.into_iter().filter(|table| table.tool() == tool) {
            tables.insert(table, saved.take(table.name()));
        }
    }
    Ok(tables)
}
