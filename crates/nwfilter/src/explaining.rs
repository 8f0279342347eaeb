//! Packets explained by the rules that a port should have.

use std::sync::Arc;

use nwfilter_explain::{Explainer, Guest};
use nwfilter_rules::Ruleset;
use nwfilter_xml::{Binding, PortDev};

use crate::{Attachment, BindingState, Driver, Error};

/// A port whose packets can be explained.
#[derive(Clone, Debug)]
pub struct ExplainedPort {
    /// Its binding.
    pub binding: Arc<Binding>,
    /// What it should enforce now. The kernel may differ from it ([`Driver::diff`]).
    pub ruleset: Ruleset,
    /// How far the port is from its filter.
    pub state: BindingState,
    /// Whether packets get to its rules; `None` for a binding that is none of a port.
    pub attachment: Option<Attachment>,
}

impl ExplainedPort {
    /// Takes packets of the port one after the other.
    pub fn explainer(&self) -> Explainer<'_> {
        Explainer::new(&self.ruleset)
    }

    /// The guest behind the port.
    pub fn guest(&self) -> Guest {
        Guest::of(&self.binding, &self.ruleset)
    }
}

impl Driver {
    /// The rules of a port, ready to explain packets. No kernel is asked about them, and nothing changes.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let driver = nwfilter::Driver::open(Default::default(), nwfilter::Fake::new())?;
    /// use nwfilter::explain::Question;
    ///
    /// let port = driver.explain(&"vnet0".parse()?)?;
    /// let question = Question::read(&port.guest(), &["in", "tcp", "to", ":80"])?;
    /// let explanation = port.explainer().explain(question.way, &question.packet)?;
    /// println!("{}", explanation.outcome);
    /// # Ok(())
    /// # }
    /// ```
    pub fn explain(&self, port: &PortDev) -> Result<ExplainedPort, Error> {
        let binding = self.binding(port)?;
        let attachment = self.attachment(&binding.port)?;
        Ok(ExplainedPort {
            ruleset: self.ruleset(&binding)?,
            state: self.binding_state(port)?,
            attachment: Some(attachment),
            binding,
        })
    }

    /// Whether packets of a port get to its rules.
    pub fn attachment(&self, port: &PortDev) -> Result<Attachment, Error> {
        let failed = |source| Error::Links { source };
        self.ports()?.attachment(port).map_err(failed)
    }

    /// The same for a binding that no port needs to have.
    pub fn explain_binding(&self, binding: Binding) -> Result<ExplainedPort, Error> {
        let ruleset = self.ruleset(&binding)?;
        Ok(ExplainedPort {
            ruleset,
            state: BindingState::Filtered,
            attachment: None,
            binding: Arc::new(binding),
        })
    }
}
