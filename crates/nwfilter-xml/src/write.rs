//! The writer: the canonical form, byte for byte that of libvirt 9.0.0.

use std::fmt::Write;

use crate::binding::Binding;
use crate::model::{Entry, Filter, Matches, Params, Rule};
use crate::set::FilterSet;
use crate::value::{Literal, Value};

/// A filter in canonical form, ending in a newline; without a uuid line where it has no UUID.
pub fn write_filter(filter: &Filter) -> String {
    let mut out = String::new();
    let Filter { chain, priority, .. } = filter;
    // libvirt leaves out any 0, and so forgets one that is not the default of its chain.
    let left_out = priority.get() == 0 && chain.default_priority() == *priority;
    let priority = if left_out { String::new() } else { format!(" priority='{priority}'") };
    line(
        &mut out,
        0,
        format_args!("<filter name='{}' chain='{}'{priority}>", escaped(filter.name.as_str()), chain),
    );
    if let Some(uuid) = filter.uuid {
        line(&mut out, 2, format_args!("<uuid>{uuid}</uuid>"));
    }
    for entry in &filter.entries {
        match entry {
            Entry::Rule(rule) => write_rule(&mut out, rule),
            Entry::Include(include) => write_filterref(&mut out, 2, include.filter.as_str(), &include.params),
        }
    }
    out.push_str("</filter>\n");
    out
}

/// A binding in canonical form, ending in a newline.
pub fn write_binding(binding: &Binding) -> String {
    let mut out = String::new();
    write_binding_at(&mut out, 0, binding);
    out
}

/// A binding as libvirt keeps it on disk, without the comment before it.
pub fn write_binding_status(binding: &Binding) -> String {
    let mut out = String::from("<filterbindingstatus>\n");
    write_binding_at(&mut out, 2, binding);
    out.push_str("</filterbindingstatus>\n");
    out
}

/// A set in canonical form, ending in a newline.
pub fn write_set(set: &FilterSet) -> String {
    let mut out = String::new();
    line(&mut out, 0, format_args!("<filterset name='{}' family='{}'>", set.name, set.family));
    for entry in &set.entries {
        match &entry.comment {
            Some(comment) => {
                let comment = escaped(comment);
                line(&mut out, 2, format_args!("<entry value='{}' comment='{comment}'/>", entry.range));
            }
            None => line(&mut out, 2, format_args!("<entry value='{}'/>", entry.range)),
        }
    }
    for set in &set.includes {
        line(&mut out, 2, format_args!("<include set='{set}'/>"));
    }
    for tag in &set.tags {
        line(&mut out, 2, format_args!("<tag name='{tag}'/>"));
    }
    out.push_str("</filterset>\n");
    out
}

fn write_binding_at(out: &mut String, indent: usize, binding: &Binding) {
    let inner = indent + 2;
    line(out, indent, format_args!("<filterbinding>"));
    line(out, inner, format_args!("<owner>"));
    line(out, inner + 2, format_args!("<name>{}</name>", escaped(&binding.owner.name)));
    line(out, inner + 2, format_args!("<uuid>{}</uuid>", binding.owner.uuid));
    line(out, inner, format_args!("</owner>"));
    line(out, inner, format_args!("<portdev name='{}'/>", escaped(binding.port.as_str())));
    if let Some(link) = &binding.link {
        line(out, inner, format_args!("<linkdev name='{}'/>", escaped(link)));
    }
    line(out, inner, format_args!("<mac address='{}'/>", binding.mac));
    write_filterref(out, inner, binding.filter.as_str(), &binding.params);
    line(out, indent, format_args!("</filterbinding>"));
}

fn write_rule(out: &mut String, rule: &Rule) {
    let statematch = if rule.statematch { "" } else { " statematch='false'" };
    let end = if rule.matches.is_some() { ">" } else { "/>" };
    let Rule { action, direction, priority, .. } = rule;
    let attributes = format!("action='{action}' direction='{direction}' priority='{priority}'{statematch}");
    line(out, 2, format_args!("<rule {attributes}{end}"));
    if let Some(matches) = &rule.matches {
        write_matches(out, matches);
        line(out, 2, format_args!("</rule>"));
    }
}

/// The items as one element, or as several where the sign changes from one item to the next.
fn write_matches(out: &mut String, matches: &Matches) {
    let element = matches.protocol.spec().element;
    if matches.items.is_empty() {
        line(out, 4, format_args!("<{element}/>"));
    }
    for same_sign in matches.items.chunk_by(|a, b| a.negated == b.negated) {
        let sign = if same_sign.iter().any(|item| item.negated) { " match='no'" } else { "" };
        let mut attributes = String::new();
        for item in same_sign {
            let mut value = item.text();
            if matches!(item.value, Value::Literal(Literal::Text(_))) {
                value = escaped(&value);
            }
            // Writing to a String cannot fail.
            let _ = write!(attributes, " {}='{value}'", item.attribute.name);
        }
        line(out, 4, format_args!("<{element}{sign}{attributes}/>"));
    }
}

fn write_filterref(out: &mut String, indent: usize, filter: &str, params: &Params) {
    let filter = escaped(filter);
    if params.is_empty() {
        line(out, indent, format_args!("<filterref filter='{filter}'/>"));
        return;
    }
    line(out, indent, format_args!("<filterref filter='{filter}'>"));
    for (name, values) in params.iter() {
        for value in values {
            line(out, indent + 2, format_args!("<parameter name='{name}' value='{value}'/>"));
        }
    }
    line(out, indent, format_args!("</filterref>"));
}

fn line(out: &mut String, indent: usize, content: std::fmt::Arguments<'_>) {
    out.extend(std::iter::repeat_n(' ', indent));
    // Writing to a String cannot fail.
    let _ = out.write_fmt(content);
    out.push('\n');
}

/// Text as the value of an attribute or the content of an element. White space other than the blank is written as
/// character references, because readers turn it into blanks.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(out, "&#{};", u32::from(c));
            }
            _ => out.push(c),
        }
    }
    out
}
