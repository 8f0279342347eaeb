//! Bindings: which filter a port has, and with which values.

use uuid::Uuid;

use crate::model::Params;
use crate::names::{FilterName, MacAddr, PortDev};

/// A `<filterbinding>` document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The guest the port belongs to.
    pub owner: Owner,
    /// The port.
    pub port: PortDev,
    /// The host's device behind a macvtap port.
    pub link: Option<String>,
    /// The guest's MAC address on this port.
    pub mac: MacAddr,
    /// The filter it has.
    pub filter: FilterName,
    /// The values it passes to the filter.
    pub params: Params,
}

/// The guest a port belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
}
