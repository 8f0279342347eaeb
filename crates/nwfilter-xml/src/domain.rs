//! Guests and their network interfaces: where libvirt's domain XML says which filter a port has.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::binding::{Binding, Owner};
use crate::model::Include;
use crate::names::{MacAddr, PortDev};
use crate::place::Place;

/// The namespace of the `<metadata>` element that gives interfaces their filters on hosts whose libvirt has no nwfilter
/// driver, and refuses `<filterref>` in `<interface>`:
///
/// ```xml
/// <domain>
///   <metadata>
///     <nwf:filterrefs xmlns:nwf='https://nwfilter.org/xmlns/filterref/1'>
///       <nwf:tag name='web'/>
///       <nwf:interface mac='52:54:00:12:34:56'>
///         <nwf:filterref filter='clean-traffic'>
///           <nwf:parameter name='IP' value='10.0.0.1'/>
///         </nwf:filterref>
///       </nwf:interface>
///     </nwf:filterrefs>
///   </metadata>
/// </domain>
/// ```
///
/// A `<tag>` gives tags to all interfaces that have a filter, or within an `<interface>` to that one, also where the filter is
/// that of the interface itself. They are added to the parameter `CTRL_TAGS` of its binding.
pub const METADATA_NAMESPACE: &str = "https://nwfilter.org/xmlns/filterref/1";

/// What a `<domain>` document says about filters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Domain {
    /// The guest's name.
    pub name: String,
    /// The guest's UUID; libvirt makes one up when it defines a guest without.
    pub uuid: Option<Uuid>,
    /// The guest's network interfaces, in document order.
    pub interfaces: Vec<Interface>,
}

/// An `<interface>` of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Interface {
    /// Its type: `bridge`, `network`, `direct`, …
    pub kind: String,
    /// The host's end of it; libvirt makes one up when the guest starts.
    pub target: Option<PortDev>,
    /// The guest's MAC address.
    pub mac: Option<MacAddr>,
    /// The bridge it is a port of.
    pub bridge: Option<String>,
    /// The libvirt network it belongs to.
    pub network: Option<String>,
    /// The host's device behind an interface of type `direct` (macvtap).
    pub link: Option<String>,
    /// Its filter, from its own `<filterref>` or from the metadata.
    pub filter: Option<Include>,
    /// Where it stands.
    #[serde(default)]
    pub place: Place,
}

/// Why an interface has no binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoBinding {
    /// It has no `<filterref>`.
    #[error("the interface has no filter")]
    Filter,
    /// It has no `<target dev=…>`: the guest does not run.
    #[error("the interface has no target device: the guest does not run")]
    Target,
    /// It has no `<mac address=…>`.
    #[error("the interface has no MAC address")]
    Mac,
    /// The domain has no `<uuid>`.
    #[error("the domain has no UUID")]
    Uuid,
}

impl Domain {
    /// The binding of one of its interfaces.
    pub fn binding(&self, interface: &Interface) -> Result<Binding, NoBinding> {
        let filter = interface.filter.as_ref().ok_or(NoBinding::Filter)?;
        Ok(Binding {
            owner: Owner { name: self.name.clone(), uuid: self.uuid.ok_or(NoBinding::Uuid)? },
            port: interface.target.clone().ok_or(NoBinding::Target)?,
            link: interface.link.clone(),
            mac: interface.mac.ok_or(NoBinding::Mac)?,
            filter: filter.filter.clone(),
            params: filter.params.clone(),
        })
    }
}
