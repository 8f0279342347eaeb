//! The status of a port in serialized form, such as JSON.

use std::net::IpAddr;

use nwfilter_xml::{FilterName, MacAddr, PortDev, Uuid};
use serde::{Serialize, Serializer};

use super::{BindingState, PortStatus, RemainingLease};
use crate::Attachment;

#[derive(Serialize)]
struct Shown<'a> {
    port: &'a PortDev,
    filter: &'a FilterName,
    mac: MacAddr,
    owner: Guest<'a>,
    address: Address<'a>,
}

#[derive(Serialize)]
struct Guest<'a> {
    name: &'a str,
    uuid: Uuid,
}

/// How the guest's address is known. Fields that do not apply are left out.
#[derive(Default, Serialize)]
struct Address<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    variable: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    addresses: Option<&'a [IpAddr]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leases: Option<Vec<Lease>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Lease {
    address: IpAddr,
    server: IpAddr,
    /// In seconds.
    remaining: Option<u64>,
}

impl Serialize for PortStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let binding = &*self.binding;
        Shown {
            port: &binding.port,
            filter: &binding.filter,
            mac: binding.mac,
            owner: Guest { name: &binding.owner.name, uuid: binding.owner.uuid },
            address: Address::of(self),
        }
        .serialize(serializer)
    }
}

impl<'a> Address<'a> {
    fn of(status: &'a PortStatus) -> Self {
        let state = Self { state: status.state_name(), ..Self::default() };
        if status.attachment != Attachment::Bridged {
            return state;
        }
        match &status.state {
            Ok(BindingState::Filtered) => state,
            Ok(BindingState::Learning { family, method } | BindingState::Unattended { family, method }) => {
                Self { variable: Some(family.variable()), method: Some(method.to_string()), ..state }
            }
            Ok(BindingState::Refused { address }) => Self { address: Some(*address), ..state },
            Ok(BindingState::Learned { addresses, source }) => {
                Self { addresses: Some(addresses), source: Some(source.to_string()), ..state }
            }
            Ok(BindingState::Leased { leases }) => {
                let leases = leases.iter().map(Lease::from).collect();
                Self { leases: Some(leases), ..state }
            }
            Err(error) => Self { error: Some(error.to_string()), ..state },
        }
    }
}

impl From<&RemainingLease> for Lease {
    fn from(lease: &RemainingLease) -> Self {
        let remaining = lease.remaining.map(|remaining| remaining.as_secs());
        Self { address: lease.address, server: lease.server, remaining }
    }
}
