//! Previews what a transaction would change.

use nwfilter_rules::{Difference, Planned, Warning};

use crate::transaction::Draft;
use crate::{Driver, Error, Event, Transaction};

/// What a transaction would change.
#[derive(Clone, Debug, Default)]
pub struct Preview {
    /// What would change in the stores: the events that a commit would publish.
    pub events: Vec<Event>,
    /// The rules of the transaction's ports that would be written ([`Missing`](crate::rules::DifferenceKind::Missing)) and
    /// removed ([`Foreign`](crate::rules::DifferenceKind::Foreign)), sorted. Rules that others changed are among them.
    pub differences: Vec<Difference>,
    /// What the host does not support, sorted.
    pub warnings: Vec<Warning>,
}

impl Driver {
    /// What a transaction would change if it were committed now. Changes nothing.
    ///
    /// Refuses what the stores would refuse. Whether the kernel accepts the rules is known only by a commit.
    pub fn preview(&self, transaction: &Transaction) -> Result<Preview, Error> {
        self.inside(|| self.preview_here(transaction))
    }

    fn preview_here(&self, transaction: &Transaction) -> Result<Preview, Error> {
        let stores = self.look()?;
        let mut draft = Draft::new(&stores, self.host(), &self.reporter);
        let events = draft.add(transaction)?.events;
        let batch = draft.into_change().batch;
        if batch.is_empty() {
            return Ok(Preview { events, ..Preview::default() });
        }
        let Planned { differences, mut warnings } = self.backend().plan(&batch)?;
        warnings.extend(self.host().unbridged(&batch));
        warnings.sort();
        Ok(Preview { events, differences, warnings })
    }
}
