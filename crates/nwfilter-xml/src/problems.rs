//! Collects the problems of a document and finds their places.

use std::ops::Range;

use crate::code::Code;
use crate::diag::{Diagnostic, Diagnostics, Severity};
use crate::place::Place;

/// After this many errors, and this many warnings, the rest is only counted.
const MAX_OF_EACH: usize = 200;
/// Characters of a line that a diagnostic keeps before its place, and at most in total.
const LINE_BEFORE: usize = 100;
const LINE_KEPT: usize = 300;

/// The problems found so far.
pub(crate) struct Problems<'t> {
    text: &'t str,
    cursor: Cursor,
    errors: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
    omitted: usize,
}

/// An offset whose place is known. Places are asked for in nearly the order of the text, so that counting from the
/// last one is cheap, however long the lines.
#[derive(Clone, Copy)]
struct Cursor {
    offset: usize,
    line: usize,
    column: usize,
}

impl<'t> Problems<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        let cursor = Cursor { offset: 0, line: 1, column: 1 };
        Self { text, cursor, errors: Vec::new(), warnings: Vec::new(), omitted: 0 }
    }

    /// Whether the document is refused.
    pub(crate) fn has_errors(&self) -> bool {
        !self.errors.is_empty()
    }

    pub(crate) fn into_diagnostics(self, document: &str) -> Diagnostics {
        let mut items = self.errors;
        items.extend(self.warnings);
        items.sort_by_key(|item| (item.place.line, item.place.column));
        Diagnostics { document: document.to_owned(), items, omitted: self.omitted }
    }

    pub(crate) fn error(
        &mut self,
        code: Code,
        range: Range<usize>,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        self.report(Severity::Error, code, range, || (message.into(), help));
    }

    pub(crate) fn warn(
        &mut self,
        code: Code,
        range: Range<usize>,
        message: impl Into<String>,
        help: Option<String>,
    ) {
        self.report(Severity::Warning, code, range, || (message.into(), help));
    }

    /// Adds a problem whose message and help cost something: they are asked for only if the problem is kept.
    pub(crate) fn report(
        &mut self,
        severity: Severity,
        code: Code,
        range: Range<usize>,
        text: impl FnOnce() -> (String, Option<String>),
    ) {
        let kept = match severity {
            Severity::Error => self.errors.len(),
            Severity::Warning => self.warnings.len(),
        };
        if kept >= MAX_OF_EACH {
            self.omitted += 1;
            return;
        }
        let (message, help) = text();
        let place = self.place(range.start);
        let (line, line_from) = self.line_around(range.start, place);
        let covered = self.text.get(range).unwrap_or("").lines().next().unwrap_or("");
        let length = narrow(covered.chars().take(LINE_KEPT).count()).max(1);
        let diagnostic = Diagnostic { code, severity, place, length, message, help, line, line_from };
        match severity {
            Severity::Error => self.errors.push(diagnostic),
            Severity::Warning => self.warnings.push(diagnostic),
        }
    }

    /// Where an offset is.
    pub(crate) fn place(&mut self, offset: usize) -> Place {
        let offset = offset.min(self.text.len());
        self.cursor = if offset >= self.cursor.offset { self.forward(offset) } else { self.back(offset) };
        Place { line: narrow(self.cursor.line), column: narrow(self.cursor.column) }
    }

    fn forward(&self, offset: usize) -> Cursor {
        let Cursor { offset: from, line, column } = self.cursor;
        let passed = &self.text[from..offset];
        match passed.rfind('\n') {
            Some(last) => {
                let line = line + newlines(passed);
                Cursor { offset, line, column: passed[last + 1..].chars().count() + 1 }
            }
            None => Cursor { offset, line, column: column + passed.chars().count() },
        }
    }

    fn back(&self, offset: usize) -> Cursor {
        let Cursor { offset: from, line, column } = self.cursor;
        let passed = &self.text[offset..from];
        match newlines(passed) {
            0 => Cursor { offset, line, column: column - passed.chars().count() },
            count => {
                let start = self.text[..offset].rfind('\n').map_or(0, |newline| newline + 1);
                Cursor { offset, line: line - count, column: self.text[start..offset].chars().count() + 1 }
            }
        }
    }

    /// The line that an offset is on, or the part of it around the offset, and the column at which that starts.
    fn line_around(&self, offset: usize, place: Place) -> (String, u32) {
        let offset = offset.min(self.text.len());
        let before = self.text[..offset].char_indices().rev().take_while(|(_, c)| *c != '\n');
        let (start, skipped) = before
            .take(LINE_BEFORE)
            .zip(1..)
            .last()
            .map_or((offset, 0), |((start, _), count)| (start, count));
        let line = self.text[start..].chars().take_while(|c| *c != '\n').take(LINE_KEPT);
        (line.collect(), place.column - skipped)
    }

    /// The offset of a row and column, both counted from 1.
    pub(crate) fn offset(&self, row: u32, column: u32) -> usize {
        let newlines = self.text.match_indices('\n').map(|(at, _)| at + 1);
        let start = std::iter::once(0).chain(newlines).nth((row as usize).saturating_sub(1)).unwrap_or(0);
        let line = self.text[start..].split('\n').next().unwrap_or("");
        let column = (column as usize).saturating_sub(1);
        start + line.char_indices().nth(column).map_or(line.len(), |(at, _)| at)
    }
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|byte| *byte == b'\n').count()
}

fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_in_any_order() {
        let text = "ab\nçdé\n\nx";
        let mut problems = Problems::new(text);
        let naive = |offset: usize| {
            let before = &text[..offset];
            (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or("").chars().count() + 1)
        };
        let offsets: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        for first in &offsets {
            for second in &offsets {
                problems.place(*first);
                let place = problems.place(*second);
                assert_eq!((place.line as usize, place.column as usize), naive(*second));
                assert_eq!(problems.offset(place.line, place.column), *second);
            }
        }
    }

    #[test]
    fn an_excerpt_of_a_long_line_is_the_part_around_the_place() {
        let text = format!("{}here{}", "a".repeat(1 << 20), "b".repeat(1 << 20));
        let mut problems = Problems::new(&text);
        problems.error(Code::BadValue, 1 << 20..(1 << 20) + 4, "wrong", None);
        let diagnostics = problems.into_diagnostics("long.xml");
        assert_eq!(diagnostics.items[0].line.len(), LINE_KEPT);
        let shown = diagnostics.to_string();
        let lines: Vec<_> = shown.lines().collect();
        let (excerpt, carets) = (lines[2], lines[3]);
        assert_eq!(excerpt.find("here"), carets.find("^^^^"), "{shown}");
    }

    #[test]
    fn beyond_a_limit_problems_are_counted() {
        let mut problems = Problems::new("text");
        (0..1000).for_each(|_| problems.warn(Code::OddSpelling, 0..1, "odd", None));
        problems.error(Code::BadValue, 0..1, "wrong", None);
        assert!(problems.has_errors());
        let diagnostics = problems.into_diagnostics("d.xml");
        assert!(diagnostics.has_errors());
        assert_eq!(diagnostics.omitted, 800);
        assert!(diagnostics.to_string().ends_with("d.xml: 800 more problems are not shown"));
    }
}
