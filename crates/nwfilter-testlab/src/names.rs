//! Names out of literals, for tests.

use nwfilter_xml::{FilterName, PortDev};

/// The port of that name. Panics if it is none.
#[track_caller]
pub fn port_dev(name: &str) -> PortDev {
    name.parse().unwrap_or_else(|error| panic!("{error}"))
}

/// The filter name. Panics if it is none.
#[track_caller]
pub fn filter_name(name: &str) -> FilterName {
    name.parse().unwrap_or_else(|error| panic!("{error}"))
}
