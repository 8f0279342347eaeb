//! Parses the output of the save tools.

use std::collections::BTreeMap;

/// A rule as a tool prints it: of others, or an earlier one of ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedRule<'a>(&'a str);

/// Where a rule sends a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target<'a> {
    /// `-j`: to a verdict, an extension, or a chain that may return.
    Jump(&'a str),
    /// `-g`: to a chain whose end returns to the caller of this one.
    Goto(&'a str),
}

impl<'a> Target<'a> {
    pub(crate) fn name(self) -> &'a str {
        match self {
            Self::Jump(name) | Self::Goto(name) => name,
        }
    }
}

impl<'a> SavedRule<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// Its words. A quoted word, such as a comment, is one word and keeps its quotes.
    pub(crate) fn words(self) -> impl Iterator<Item = &'a str> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            rest = rest.trim_ascii_start();
            if rest.is_empty() {
                return None;
            }
            let (word, behind) = rest.split_at(word_end(rest));
            rest = behind;
            Some(word)
        })
    }

    /// The word after an option. This is `!` where ebtables negates the option.
    pub(crate) fn value(self, option: &str) -> Option<&'a str> {
        let mut words = self.words();
        words.find(|word| *word == option).and_then(|_| words.next())
    }

    /// Where it sends a packet. `None` for a rule that only counts.
    pub(crate) fn target(self) -> Option<Target<'a>> {
        let mut words = self.words();
        match words.find(|word| ["-j", "-g"].contains(word))? {
            "-j" => words.next().map(Target::Jump),
            _ => words.next().map(Target::Goto),
        }
    }

    /// The rule, returning instead of accepting.
    pub(crate) fn returning(self) -> String {
        match (self.target(), self.0.strip_suffix("-j ACCEPT")) {
            (Some(Target::Jump("ACCEPT")), Some(matches)) => format!("{matches}-j RETURN"),
            _ => self.0.to_owned(),
        }
    }
}

/// The length of the word at the beginning of a text.
fn word_end(text: &str) -> usize {
    let Some(quoted) = text.strip_prefix('"') else {
        return text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len());
    };
    let mut escaped = false;
    let end = quoted.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 2)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_a_comment_is_neither_an_option_nor_a_target() {
        let text = r#"-p tcp -m comment --comment "say \"-j DROP\" -i vnet0" -i eth0 -g theirs"#;
        let rule = SavedRule::new(text);
        assert_eq!(rule.target(), Some(Target::Goto("theirs")));
        assert_eq!(rule.value("-i"), Some("eth0"));
        assert_eq!(rule.words().nth(5), Some(r#""say \"-j DROP\" -i vnet0""#));
        assert_eq!(SavedRule::new("-m comment --comment \"open").words().last(), Some("\"open"));
    }

    #[test]
    fn only_accept_becomes_return() {
        for (rule, returning) in [
            ("-p tcp -j ACCEPT", "-p tcp -j RETURN"),
            ("-j DROP", "-j DROP"),
            ("-m comment --comment \"x\" -j ACCEPT", "-m comment --comment \"x\" -j RETURN"),
            ("-p udp", "-p udp"),
        ] {
            assert_eq!(SavedRule::new(rule).returning(), returning);
        }
    }
}
