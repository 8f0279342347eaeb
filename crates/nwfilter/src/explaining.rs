//! Packets explained by the rules that a port should have.

use std::sync::Arc;

use nwfilter_explain::{Explainer, Guest, IpSets};
use nwfilter_rules::{Ruleset, sets_of};
use nwfilter_xml::{Binding, PortDev};

use crate::{Attachment, BindingState, Driver, Error};

/// A port whose packets can be explained.
#[derive(Clone, Debug)]
pub struct ExplainedPort {
    /// Its binding.
    pub binding: Arc<Binding>,
    /// What it should enforce now. The kernel may differ from it ([`Driver::diff`]).
    pub ruleset: Ruleset,
    /// The sets of the store that its rules ask, with what they hold.
    pub sets: IpSets,
    /// How far the port is from its filter.
    pub state: BindingState,
    /// Whether packets get to its rules; `None` for a binding that is none of a port.
    pub attachment: Option<Attachment>,
}

impl ExplainedPort {
    /// Takes packets of the port one after the other.
    pub fn explainer(&self) -> Explainer<'_> {
        Explainer::new(&self.ruleset).with_sets(self.sets.clone())
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
        let ruleset = self.ruleset(&binding)?;
        Ok(ExplainedPort {
            sets: self.sets_for(&ruleset)?,
            ruleset,
            state: self.binding_state(port)?,
            attachment: Some(attachment),
            binding,
        })
    }

    fn sets_for(&self, ruleset: &Ruleset) -> Result<IpSets, Error> {
        let mut sets = IpSets::default();
        for (name, _) in sets_of(ruleset) {
            sets.hold(name.clone(), Arc::new(self.set_content(name)?));
        }
        Ok(sets)
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
            sets: self.sets_for(&ruleset)?,
            ruleset,
            state: BindingState::Filtered,
            attachment: None,
            binding: Arc::new(binding),
        })
    }
}
