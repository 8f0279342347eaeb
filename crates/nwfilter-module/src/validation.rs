//! The flag VALIDATE: refuses documents that libvirt's schema does not allow, as far as the reader knows it.

use nwfilter_xml::{Binding, Code as Problem, Diagnostics, Filter, Reading};

use crate::refusal::{Code, Refusal, document_code};

/// How strictly a document is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validation {
    /// Content that libvirt ignores or replaces is accepted.
    Lenient,
    /// The document must conform to the schema.
    Schema,
}

/// A document with names that the schema restricts.
pub(crate) trait Named {
    /// The names that must be an NCName.
    fn names(&self) -> Vec<&str>;
}

impl Named for Filter {
    fn names(&self) -> Vec<&str> {
        let includes = self.includes().map(|include| include.filter.as_str());
        std::iter::once(self.name.as_str()).chain(includes).collect()
    }
}

impl Named for Binding {
    fn names(&self) -> Vec<&str> {
        vec![self.filter.as_str()]
    }
}

/// Returns the document if it is valid, and logs its warnings.
pub(crate) fn valid<T: Named>(reading: Reading<T>, validation: Validation) -> Result<T, Refusal> {
    if validation == Validation::Schema {
        conforms(&reading)?;
    }
    if let Some(warnings) = reading.warnings() {
        log::log!(if warnings.widen_a_rule() { log::Level::Error } else { log::Level::Warn }, "{warnings}");
    }
    reading
        .into_result()
        .map_err(|problems: Diagnostics| Refusal::new(document_code(&problems), problems.to_string()))
}

fn conforms<T: Named>(reading: &Reading<T>) -> Result<(), Refusal> {
    let problems = &reading.diagnostics;
    if problems.items.iter().any(|item| !schema_allows(item.code)) {
        // libvirt checks the schema only if the document is well-formed and has the expected root element.
        let elsewhere = problems.items.iter().any(|item| item.code == Problem::WrongDocument);
        let code = match document_code(problems) {
            Code::Xml if !elsewhere => Code::XmlInvalidSchema,
            code => code,
        };
        return Err(Refusal::new(code, problems.to_string()));
    }
    let names = reading.value.iter().flat_map(Named::names);
    match names.into_iter().find(|name| !is_ncname(name)) {
        Some(name) => {
            Err(Refusal::new(Code::XmlInvalidSchema, format!("the schema does not allow the name '{name}'")))
        }
        None => Ok(()),
    }
}

/// Whether the schema allows what the reader warns about.
fn schema_allows(problem: Problem) -> bool {
    matches!(
        problem,
        Problem::PriorityWithoutChain
            | Problem::WithoutEffect
            | Problem::EmptyRange
            | Problem::NeverMatches
            | Problem::SignOfAnother
    )
}

/// Whether a name is an NCName of XML.
fn is_ncname(name: &str) -> bool {
    let first = |c: char| c.is_alphabetic() || c == '_';
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_numeric() || ".-·".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ncname_begins_with_a_letter_and_has_neither_blanks_nor_colons() {
        assert!(["a", "_1", "no-mac.spoofing", "über"].iter().all(|name| is_ncname(name)));
        assert!(["", "1a", "-a", "a b", "a:b", "a/b", "a$"].iter().all(|name| !is_ncname(name)));
    }
}
