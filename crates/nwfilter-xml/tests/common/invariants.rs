//! What holds for every text, whatever it is. The fuzz target and the tests share it.

use nwfilter_xml::{
    Diagnostics, Filter, Reading, check, read_binding, read_domain, read_filter, read_set, write_binding,
    write_filter, write_set,
};

/// Reads a text as every kind of document.
///
/// # Panics
///
/// If an invariant does not hold.
pub(crate) fn hold(text: &str) {
    points_inside(&check("any.xml", text), text);
    let filter = read_filter("filter.xml", text);
    consistent(&filter, text);
    if let Some(filter) = filter.value {
        let written = write_filter(&filter);
        let again = read_filter("filter.xml", &written).value.map(Filter::without_places);
        assert_eq!(again, Some(filter.without_places()), "{written}");
    }
    let binding = read_binding("binding.xml", text);
    consistent(&binding, text);
    if let Some(binding) = binding.value {
        let written = write_binding(&binding);
        assert_eq!(read_binding("binding.xml", &written).value.as_ref(), Some(&binding), "{written}");
    }
    let set = read_set("set.xml", text);
    consistent(&set, text);
    if let Some(set) = set.value {
        let written = write_set(&set);
        assert_eq!(read_set("set.xml", &written).value.as_ref(), Some(&set), "{written}");
    }
    consistent(&read_domain("domain.xml", text), text);
}

/// A document is refused if, and only if, there is an error.
fn consistent<T>(reading: &Reading<T>, text: &str) {
    points_inside(&reading.diagnostics, text);
    assert_eq!(reading.value.is_none(), reading.diagnostics.has_errors(), "{}", reading.diagnostics);
}

/// Every diagnostic points to a character of the document, or just after the last of a line.
fn points_inside(diagnostics: &Diagnostics, text: &str) {
    for item in &diagnostics.items {
        let line = text.split('\n').nth(item.place.line as usize - 1);
        let length = line.map(|line| line.chars().count());
        assert!(length.is_some_and(|length| item.place.column as usize <= length + 1), "{diagnostics}");
    }
    assert_eq!(diagnostics.items.is_empty(), diagnostics.to_string().is_empty());
}
