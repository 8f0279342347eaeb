//! Errors for callers of libvirt: libvirt's error code for the case, and our message.

use nwfilter::{Error, Location, with_causes};
use nwfilter_xml::{Code as Problem, Diagnostics};

/// libvirt's error numbers (virErrorNumber) that this driver uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Code {
    /// VIR_ERR_INTERNAL_ERROR
    Internal = 1,
    /// VIR_ERR_INVALID_ARG
    InvalidArg = 8,
    /// VIR_ERR_OPERATION_FAILED
    OperationFailed = 9,
    /// VIR_ERR_XML_ERROR
    Xml = 27,
    /// VIR_ERR_XML_DETAIL
    XmlDetail = 35,
    /// VIR_ERR_OPERATION_INVALID
    OperationInvalid = 55,
    /// VIR_ERR_NO_NWFILTER
    NoFilter = 62,
    /// VIR_ERR_XML_INVALID_SCHEMA
    XmlInvalidSchema = 92,
    /// VIR_ERR_NO_NWFILTER_BINDING
    NoBinding = 101,
}

/// Why a call is refused.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// To be reported to libvirt.
    New(Code, String),
    /// libvirt has reported it already.
    Reported,
}

impl Refusal {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self::New(code, message.into())
    }

    pub(crate) fn reported() -> Self {
        Self::Reported
    }
}

impl Refusal {
    /// An error, with the place of the rule that it is about.
    pub(crate) fn at(error: &Error, place: Option<Location>) -> Self {
        let place = place.map(|place| format!(" (at {place})")).unwrap_or_default();
        Self::New(code(error), with_causes(error) + &place)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::at(&error, None)
    }
}

/// The code that libvirt's own driver uses in the same case.
fn code(error: &Error) -> Code {
    match error {
        Error::Invalid(problems) => document_code(problems),
        Error::NoSuchFilter(_) => Code::NoFilter,
        Error::NoSuchBinding(_) => Code::NoBinding,
        Error::StockFilter(_) | Error::FilterInUse { .. } => Code::OperationInvalid,
        Error::UuidConflict { .. } | Error::IncludesItself { .. } | Error::BindingExists(_) => {
            Code::OperationFailed
        }
        _ => Code::Internal,
    }
}

/// The code for a document that is refused without validation: one for malformed XML, another for wrong content.
pub(crate) fn document_code(problems: &Diagnostics) -> Code {
    let no_xml = |problem| {
        let all = [
            Problem::DocumentType,
            Problem::MalformedXml,
            Problem::EndsEarly,
            Problem::EmptyDocument,
            Problem::TooDeep,
        ];
        all.contains(&problem)
    };
    if problems.items.iter().any(|item| no_xml(item.code)) { Code::XmlDetail } else { Code::Xml }
}
