//! What the save tools print, as chains of comparable rules.

use std::collections::BTreeMap;

/// One table: chains by name, each with its rules in order.
pub(crate) type SavedTable = BTreeMap<String, Vec<String>>;

/// The tables of one tool, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    tables: BTreeMap<String, SavedTable>,
}

impl Saved {
    /// Reads the output of `TOOL-save`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut tables: BTreeMap<String, SavedTable> = BTreeMap::new();
        let mut current = String::new();
        for line in text.lines() {
            let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Some(table) = line.strip_prefix('*') {
                current = table.to_owned();
                tables.entry(current.clone()).or_default();
            } else if let Some(chain) = command.strip_prefix(':') {
                tables.entry(current.clone()).or_default().entry(chain.to_owned()).or_default();
            } else if command == "-A" {
                let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
                let chains = tables.entry(current.clone()).or_default();
                chains.entry(chain.to_owned()).or_default().push(rule.trim_end().to_owned());
            }
        }
        Self { tables }
    }

    /// Takes a table out; an empty one where the tool shows none.
    pub(crate) fn take(&mut self, name: &str) -> SavedTable {
        self.tables.remove(name).unwrap_or_default()
    }

    /// A table; an empty one where the tool shows none.
    pub(crate) fn table(&self, name: &str) -> &SavedTable {
        const EMPTY: &SavedTable = &SavedTable::new();
        self.tables.get(name).unwrap_or(EMPTY)
    }
}
