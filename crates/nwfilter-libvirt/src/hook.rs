//! The protocol of libvirt's hook script, and what each call of it needs.

use nwfilter::{Driver, Error};
use nwfilter_xml::{Diagnostics, Domain, Uuid, read_domain};

use crate::sync::{Guest, Plan, Refused};

/// A call of `/etc/libvirt/hooks/qemu` or `/etc/libvirt/hooks/lxc`.
///
/// libvirt passes the guest's name, an operation and two more words as arguments, and the guest's XML on stdin. It waits
/// until the script ends. The effect of a failure depends on the operation.
///
/// ```
/// use nwfilter_libvirt::{HookCall, Operation};
///
/// let call = HookCall::from_args(["vm", "start", "begin", "-"]).unwrap();
/// assert_eq!((call.guest.as_str(), call.operation), ("vm", Operation::Start));
/// assert!(call.operation.concerns_filters());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookCall {
    /// The guest's name.
    pub guest: String,
    /// The operation.
    pub operation: Operation,
}

/// An operation on a guest, as far as it concerns filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The guest's ports exist, and it has run no instruction. A failure aborts the start.
    Start,
    /// libvirt was restarted and found the guest running, or took over a guest that another program had started.
    Reconnect,
    /// The guest ended.
    Stopped,
    /// Another operation, which needs nothing.
    Other,
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// The arguments are not those of a hook script.
    #[error("called as no libvirt does: expected GUEST OPERATION SUB-OPERATION EXTRA")]
    Arguments,
    /// The guest's XML cannot be read.
    #[error("the guest's XML")]
    Xml(#[from] Diagnostics),
    /// A port cannot be filtered.
    #[error("the guest cannot be filtered")]
    Refused(#[source] Box<Refused>),
    /// The stores cannot be read.
    #[error("the bindings cannot be read")]
    Driver(#[from] Error),
}

impl Operation {
    /// Whether the operation concerns filters, so that the guest's XML is needed.
    pub fn concerns_filters(self) -> bool {
        self != Self::Other
    }
}

impl HookCall {
    /// Reads the arguments of the script, without the script's name.
    pub fn from_args<S: AsRef<str>>(args: impl IntoIterator<Item = S>) -> Result<Self, HookError> {
        let mut args = args.into_iter();
        let (Some(guest), Some(operation)) = (args.next(), args.next()) else {
            return Err(HookError::Arguments);
        };
        let operation = match operation.as_ref() {
            "start" => Operation::Start,
            "reconnect" | "attach" => Operation::Reconnect,
            "stopped" | "release" => Operation::Stopped,
            _ => Operation::Other,
        };
        Ok(Self { guest: guest.as_ref().to_owned(), operation })
    }

    /// Carries out what the operation needs. `xml` is the guest's XML from stdin.
    ///
    /// At a start either all ports are bound or none, and the error names the first port that was refused.
    pub fn run(&self, driver: &Driver, xml: &str) -> Result<(), HookError> {
        if !self.operation.concerns_filters() {
            return Ok(());
        }
        let reading = read_domain("domain", xml);
        let uuid = reading.value.as_ref().and_then(|domain| domain.uuid);
        match self.operation {
            Operation::Other => Ok(()),
            Operation::Stopped => self.end(driver, uuid),
            Operation::Reconnect => begin(driver, reading.into_result()?),
            Operation::Start => begin(driver, reading.into_result()?).inspect_err(|_| {
                if let Err(error) = self.end(driver, uuid) {
                    log::error!("the bindings of '{}' are left: {error}", self.guest);
                }
            }),
        }
    }

    /// Unbinds the guest's ports. If its XML cannot be read, they are found by its name.
    fn end(&self, driver: &Driver, uuid: Option<Uuid>) -> Result<(), HookError> {
        let guests: Vec<_> = match uuid {
            Some(uuid) => vec![Guest::Ended(uuid)],
            None => {
                let bindings = driver.bindings()?;
                let named = bindings.iter().filter(|binding| binding.owner.name == self.guest);
                named.map(|binding| Guest::Ended(binding.owner.uuid)).collect()
            }
        };
        Plan::new(driver, &guests)?.carry_out(driver);
        Ok(())
    }
}

fn begin(driver: &Driver, domain: Domain) -> Result<(), HookError> {
    let plan = Plan::new(driver, [&Guest::Running(domain)])?;
    match plan.carry_out(driver).refused.into_iter().next() {
        Some(refused) => Err(HookError::Refused(Box::new(refused))),
        None => Ok(()),
    }
}
