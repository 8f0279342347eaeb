//! libvirt's nwfilter language as typed Rust values.
//!
//! This crate reads and writes `<filter>` and `<filterbinding>` documents, and `<filterset>` documents, which are this
//! project's own, and reads the `<interface>` elements of `<domain>` documents. It accepts what libvirt accepts, says of every problem where it is and what was expected, and
//! writes libvirt's canonical form byte for byte. It does no
//! I/O and knows nothing of what a rule means to the kernel; that is `nwfilter-rules`.
//!
//! ```
//! let text = "<filter name='ssh'>
//!   <rule action='accept' direction='in'><tcp dstportstart='22'/></rule>
//! </filter>";
//! let filter = nwfilter_xml::read_filter("ssh.xml", text).into_result()?;
//! assert_eq!(filter.chain.as_str(), "root");
//! assert!(nwfilter_xml::write_filter(&filter).contains("<tcp dstportstart='22'/>"));
//!
//! let refused = nwfilter_xml::read_filter("ssh.xml", &text.replace("accept", "acept"));
//! let message = refused.into_result().unwrap_err().to_string();
//! assert!(message.starts_with("ssh.xml:2:17: error[NWF0020]: unknown action 'acept'"));
//! # Ok::<(), nwfilter_xml::Diagnostics>(())
//! ```

#![forbid(unsafe_code)]

mod binding;
mod builder;
mod code;
mod decode;
mod diag;
mod domain;
mod lint;
mod model;
mod names;
mod place;
mod problems;
mod read;
mod read_binding;
mod read_domain;
mod read_filter;
mod read_set;
mod scan;
pub mod schema;
mod set;
mod text;
pub mod value;
mod write;

pub use binding::{Binding, Owner};
pub use builder::BindingBuilder;
pub use code::Code;
pub use decode::decode;
pub use diag::{Diagnostic, Diagnostics, Severity, nearest};
pub use domain::{Domain, Interface, METADATA_NAMESPACE, NoBinding};
pub use model::{Action, Direction, Entry, Filter, Include, Item, Matches, Params, Rule};
pub use names::{ChainKind, ChainName, FilterName, MacAddr, PortDev, Priority, VarName};
pub use place::Place;
pub use read::{
    DocumentKind, MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_ENTRIES, MAX_NAMESPACES, MAX_VALUES, Reading,
    Strictness, check, check_with, read_binding, read_domain, read_filter, read_filter_with, read_set,
};
pub use schema::{Field, Layer, Protocol};
pub use set::{
    BadSetEntry, FilterSet, MAX_SET_BYTES, MAX_SET_COMMENT, MAX_SET_ENTRIES, SetEntry, SetFamily, SetName,
    SetRange, Tag,
};
pub use uuid::Uuid;
pub use value::{Access, Kind, Literal, Value, VarRef};
pub use write::{write_binding, write_binding_status, write_filter, write_set};

/// A name that cannot be what it was meant to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' cannot be {article} {what}: {why}", text = text.escape_debug(), article = article(what))]
pub struct Error {
    what: &'static str,
    text: String,
    why: &'static str,
}

impl Error {
    pub(crate) fn name(what: &'static str, text: &str, why: &'static str) -> Self {
        // What is wrong with a very long name shows at its start.
        let text = text.chars().take(64).collect();
        Self { what, text, why }
    }
}

fn article(noun: &str) -> &'static str {
    if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}
