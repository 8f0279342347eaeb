//! What is wrong with a document, shown like a compiler's diagnostics.

use std::fmt;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use crate::code::Code;
use crate::place::Place;
use crate::problems::Problems;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
#[non_exhaustive]
pub struct Diagnostic {
    /// What kind of problem it is.
    pub code: Code,
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
#[non_exhaustive]
pub struct Diagnostics {
    /// The name of the document, as a file name.
    pub document: String,
    /// The problems.
    pub items: Vec<Diagnostic>,
    /// How many more there are.
    pub omitted: usize,
}

impl Diagnostics {
    /// No problems of a document.
    pub fn none(document: &str) -> Self {
        Self { document: document.to_owned(), items: Vec::new(), omitted: 0 }
    }

    /// One error about a document that could be read, at a place in its text and so many characters long.
    pub fn error(
        document: &str,
        text: &str,
        code: Code,
        (place, length): (Place, usize),
        message: impl Into<String>,
        help: Option<String>,
    ) -> Self {
        let mut problems = Problems::new(text);
        let start = problems.offset(place.line, place.column);
        let end = text[start..].char_indices().nth(length).map_or(text.len(), |(at, _)| start + at);
        problems.error(code, start..end, message, help);
        problems.into_diagnostics(document)
    }

    /// Adds the problems that somebody else found in the same document.
    pub fn merge(&mut self, other: Diagnostics) {
        self.items.extend(other.items);
        self.items.sort_by_key(|item| item.place);
        self.omitted += other.omitted;
    }

    /// Whether any of them makes a rule match more than is written.
    pub fn widen_a_rule(&self) -> bool {
        self.items.iter().any(|item| item.code.widens_a_rule())
    }

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
            let Diagnostic { code, severity, place, message, .. } = item;
            write!(f, "{}:{place}: {severity}[{code}]: {message}", self.document)?;
            if !item.line.is_empty() {
                write!(f, "\n{}", item.excerpt())?;
            }
            if let Some(help) = &item.help {
                // In the excerpt's gutter, which is as wide as the number of the line.
                let gutter = if item.line.is_empty() { 1 } else { place.line.to_string().len() };
                write!(f, "\n{:gutter$} = help: {help}", "")?;
            }
        }
        match self.omitted {
            0 => Ok(()),
            omitted => write!(f, "\n{}: {omitted} more problems are not shown", self.document),
        }
    }
}

impl Diagnostic {
    /// The line, and under it what of it is meant.
    fn excerpt(&self) -> String {
        let byte = |column: u32| {
            let skipped = column.saturating_sub(self.line_from) as usize;
            self.line.char_indices().nth(skipped).map_or(self.line.len(), |(at, _)| at)
        };
        let span = byte(self.place.column)..byte(self.place.column.saturating_add(self.length));
        let snippet = Snippet::source(self.line.as_str())
            .line_start(self.place.line as usize)
            .annotation(AnnotationKind::Primary.span(span));
        let group = Group::with_level(Level::ERROR).element(snippet);
        Renderer::plain().term_width(SHOWN_WIDTH).render(&[group])
    }
}

/// Of `candidates` the one that `word` most likely was meant to be: at most a third of its characters differ, or it
/// is the beginning.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // No word of the language is longer.
    let word: String = word.chars().take(64).collect::<String>().to_ascii_lowercase();
    let limit = (word.len() / 3).max(1);
    let distance = |candidate: &str| {
        let candidate = candidate.to_ascii_lowercase();
        let begins = word.len() > 2 && candidate.starts_with(&word);
        if begins { limit } else { strsim::osa_distance(&word, &candidate) }
    };
    let scored = candidates.into_iter().map(|candidate| (distance(candidate), candidate));
    scored.filter(|(distance, _)| *distance <= limit).min_by_key(|(distance, _)| *distance).map(|(_, c)| c)
}
