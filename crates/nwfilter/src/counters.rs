//! What the rules of filters have counted in the kernel.

use std::sync::Arc;

use nwfilter_rules::{Batch, Counts};
use nwfilter_xml::PortDev;

use crate::{Driver, Error};

impl Driver {
    /// What every rule has counted for every port, since it was written to the kernel. Nothing changes.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let driver = nwfilter::Driver::open(Default::default(), nwfilter::Fake::new())?;
    /// for rule in driver.counters()?.by_rule().iter().filter(|rule| rule.stops) {
    ///     println!("{}: {} packets stopped at {} ports", rule.origin, rule.count.packets, rule.ports.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn counters(&self) -> Result<Counts, Error> {
        self.inside(|| self.counters_here())
    }

    fn counters_here(&self) -> Result<Counts, Error> {
        let stores = self.look()?;
        let filters = stores.filter_map();
        let mut batch = Batch::default();
        let mut without_rules = Vec::new();
        for binding in stores.bindings.documents().filter(|binding| self.host().has(&binding.port)) {
            match stores.ruleset(&filters, binding) {
                Ok(ruleset) => batch.filter(binding.port.clone(), Arc::new(ruleset)),
                // `diff` and `reload` say why.
                Err(_) => without_rules.push(binding.port.clone()),
            }
        }
        let mut counts = self.counts(&batch)?;
        counts.differing.extend(without_rules);
        Ok(counts)
    }

    /// The same for one port.
    pub fn port_counters(&self, port: &PortDev) -> Result<Counts, Error> {
        let binding = self.binding(port)?;
        let mut batch = Batch::default();
        batch.filter(port.clone(), Arc::new(self.ruleset(&binding)?));
        self.counts(&batch)
    }

    fn counts(&self, batch: &Batch) -> Result<Counts, Error> {
        if batch.ports.is_empty() {
            return Ok(Counts::default());
        }
        self.inside(|| Ok(self.backend().rules(batch)?.into()))
    }
}
