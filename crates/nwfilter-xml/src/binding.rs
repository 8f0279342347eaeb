//! Bindings: which filter a port has, and with which values.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::builder::BindingBuilder;
use crate::model::Params;
use crate::names::{FilterName, MacAddr, PortDev, VarName};

/// A `<filterbinding>` document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Binding {
    /// The guest the port belongs to.
    pub owner: Owner,
    /// The port.
    pub port: PortDev,
    /// The host's device behind a macvtap port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The guest's MAC address on this port.
    pub mac: MacAddr,
    /// The filter it has.
    pub filter: FilterName,
    /// The values it passes to the filter.
    #[serde(default)]
    pub params: Params,
}

impl Binding {
    /// Collects the parts of a binding.
    ///
    /// ```
    /// use nwfilter_xml::{Binding, Uuid};
    ///
    /// let binding = Binding::builder()
    ///     .owner("vm", Uuid::from_u128(1))
    ///     .port("vnet0")
    ///     .mac("52:54:00:7b:35:93")
    ///     .filter("clean-traffic")
    ///     .parameter("IP", "10.0.0.2")
    ///     .build()?;
    /// assert_eq!(binding.port.as_str(), "vnet0");
    ///
    /// let refused = Binding::builder().owner("vm", Uuid::from_u128(1)).port("vnet0").build().unwrap_err();
    /// assert_eq!(refused.to_string(), "'' cannot be a MAC address: it is missing");
    /// # Ok::<(), nwfilter_xml::Error>(())
    /// ```
    pub fn builder() -> BindingBuilder {
        BindingBuilder::default()
    }

    /// Passes the MAC address of the port as the parameter `MAC`, unless that is given.
    pub fn pass_mac(&mut self) {
        self.params.set_default(VarName::mac(), &self.mac);
    }
}

/// The guest a port belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
}
