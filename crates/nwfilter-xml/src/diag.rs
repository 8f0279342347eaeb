//! What is wrong with a document, shown like a compiler's diagnostics.

use std::fmt;

use crate::model::Place;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// libvirt takes the document, but ignores or replaces what is meant here.
    Warning,
    /// The document is refused.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Warning => "warning",
            Severity::Error => "error",
        })
    }
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Where it is.
    pub place: Place,
    /// How many characters it covers on its line, at least 1.
    pub length: u32,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The line it is on; of a very long one, the part around the place.
    pub line: String,
    /// The column at which [`line`](Self::line) starts, 1 unless it is only a part.
    pub line_from: u32,
}

/// All problems of one document, in document order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    /// The name of the document, as a file name.
    pub document: String,
    /// The problems.
    pub items: Vec<Diagnostic>,
    /// How many more there are.
    pub omitted: usize,
}

impl Diagnostics {
    /// Whether any of them refuses the document.
    pub fn has_errors(&self) -> bool {
        self.items.iter().any(|item| item.severity == Severity::Error)
    }
}

impl std::error::Error for Diagnostics {}

/// Longest part of a source line that is shown; machine-written documents can be one line of a megabyte.
const SHOWN_WIDTH: usize = 160;

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.items.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let Diagnostic { severity, place, message, .. } = item;
            write!(f, "{}:{place}: {severity}: {message}", self.document)?;
            item.write_excerpt(f)?;
            if let Some(help) = &item.help {
                write!(f, "\n  = help: {help}")?;
            }
        }
        match self.omitted {
            0 => Ok(()),
            omitted => write!(f, "\n{}: {omitted} more problems are not shown", self.document),
        }
    }
}

impl Diagnostic {
    fn write_excerpt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let column = (self.place.column.saturating_sub(self.line_from)) as usize;
        let skipped = if column + 20 > SHOWN_WIDTH { column.saturating_sub(40) } else { 0 };
        // Tabs and control characters would move the caret or the terminal.
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        let shown: String = self.line.chars().skip(skipped).take(SHOWN_WIDTH).map(clean).collect();
        let indent = column - skipped;
        let width = (self.length as usize).clamp(1, SHOWN_WIDTH.saturating_sub(indent).max(1));
        let number = self.place.line.to_string();
        let gutter = " ".repeat(number.len());
        write!(f, "\n {gutter} |\n {number} | {}\n {gutter} | ", shown.trim_end())?;
        write!(f, "{}{}", " ".repeat(indent), "^".repeat(width))
    }
}

/// Of `candidates` the one that `word` most likely was meant to be: at most a third of its characters differ, or it
/// is the beginning.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let limit = (word.len() / 3).max(1);
    let distance = |candidate: &str| {
        let candidate = candidate.to_ascii_lowercase();
        let begins = word.len() > 2 && candidate.starts_with(&word);
        if begins { limit } else { edit_distance(&word, &candidate) }
    };
    let scored = candidates.into_iter().map(|candidate| (distance(candidate), candidate));
    scored.filter(|(distance, _)| *distance <= limit).min_by_key(|(distance, _)| *distance).map(|(_, c)| c)
}

/// The number of insertions, deletions and replacements that turn `a` into `b`.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
