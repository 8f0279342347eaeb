//! Bindings out of texts, as a manager has them.

use uuid::Uuid;

use crate::Error;
use crate::binding::{Binding, Owner};
use crate::model::Params;

/// Collects the parts of a [`Binding`]: [`Binding::builder`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct BindingBuilder {
    owner: Option<Owner>,
    port: Option<String>,
    link: Option<String>,
    mac: Option<String>,
    filter: Option<String>,
    params: Vec<(String, String)>,
}

impl BindingBuilder {
    /// The guest that the port belongs to.
    pub fn owner(mut self, name: impl Into<String>, uuid: Uuid) -> Self {
        self.owner = Some(Owner { name: name.into(), uuid });
        self
    }

    /// The network interface.
    pub fn port(mut self, port: impl ToString) -> Self {
        self.port = Some(port.to_string());
        self
    }

    /// The host's device behind a macvtap port.
    pub fn link(mut self, link: impl Into<String>) -> Self {
        self.link = Some(link.into());
        self
    }

    /// The guest's MAC address.
    pub fn mac(mut self, mac: impl ToString) -> Self {
        self.mac = Some(mac.to_string());
        self
    }

    /// The filter.
    pub fn filter(mut self, name: impl ToString) -> Self {
        self.filter = Some(name.to_string());
        self
    }

    /// A value that is passed to the filter. A name that is given more than once is a list.
    pub fn parameter(mut self, name: impl ToString, value: impl ToString) -> Self {
        self.params.push((name.to_string(), value.to_string()));
        self
    }

    /// The binding, if all of owner, port, MAC address and filter are there and valid.
    pub fn build(self) -> Result<Binding, Error> {
        let given = |what, part: Option<String>| part.ok_or_else(|| missing(what));
        let mut params = Params::new();
        for (name, value) in self.params {
            params.insert(name.parse()?, &value)?;
        }
        Ok(Binding {
            owner: self.owner.ok_or_else(|| missing("owner"))?,
            port: given("port device", self.port)?.parse()?,
            link: self.link,
            mac: given("MAC address", self.mac)?.parse()?,
            filter: given("filter name", self.filter)?.parse()?,
            params,
        })
    }
}

fn missing(what: &'static str) -> Error {
    Error::name(what, "", "it is missing")
}
