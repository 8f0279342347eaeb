//! Writes plans as the input of a restore tool, and keeps the origin of each line.

use nwfilter_rules::{KernelObject, Origin};
use nwfilter_xml::PortDev;

use crate::dispatch::dispatchers;
use crate::plan::{Edit, Plan};
use crate::tool::Tool;

/// A restore text.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) text: String,
    /// For each line.
    rules: Vec<Option<RuleOfPort>>,
}

/// The port and filter rule of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleOfPort {
    pub(crate) port: PortDev,
    pub(crate) origin: Origin,
    pub(crate) object: KernelObject,
}

impl Script {
    /// The input that applies plans of one tool.
    pub(crate) fn of<'a>(plans: impl IntoIterator<Item = &'a Plan>) -> Self {
        let mut script = Self::default();
        plans.into_iter().for_each(|plan| script.add(plan));
        script
    }

    /// Adds a table.
    fn add(&mut self, plan: &Plan) {
        let (table, tool) = (plan.table, plan.tool());
        self.line(format!("*{}", table.name()), None);
        let dispatchers = dispatchers(table);
        for name in plan.chains.keys() {
            let policy = match tool {
                // As in libvirt's chains, a frame that no rule matches is accepted, also in the chain that jumped there.
                Tool::Ebtables if !dispatchers.iter().any(|d| d.has_in_tree(name)) => "ACCEPT",
                Tool::Ebtables => "RETURN",
                Tool::Iptables | Tool::Ip6tables => "- [0:0]",
            };
            self.line(format!(":{name} {policy}"), None);
        }
        let (deletes, others): (Vec<_>, Vec<_>) =
            plan.edits_in_order().partition(|edit| matches!(edit, Edit::Delete { .. }));
        deletes.into_iter().for_each(|edit| self.line(edit.text(), None));
        for (name, change) in &plan.chains {
            for (index, rule) in change.after.iter().flatten().enumerate() {
                let of_port = change.port.as_ref().zip(change.origins.get(index)).map(|(port, origin)| {
                    RuleOfPort { port: port.clone(), origin: origin.clone(), object: table.chain(name) }
                });
                self.line(format!("-A {name} {rule}"), of_port);
            }
        }
        others.into_iter().for_each(|edit| self.line(edit.text(), None));
        for name in plan.chains.iter().filter(|(_, change)| change.after.is_none()).map(|(name, _)| name) {
            self.line(format!("-X {name}"), None);
        }
        if tool.commits() {
            self.line("COMMIT".to_owned(), None);
        }
    }

    fn line(&mut self, line: String, of_port: Option<RuleOfPort>) {
        self.text.push_str(&line);
        self.text.push('\n');
        self.rules.push(of_port);
    }

    /// The rule on a line, counted from 1, and its origin.
    pub(crate) fn rule_at(&self, line: usize) -> Option<(&str, &RuleOfPort)> {
        let of_port = self.rules.get(line.checked_sub(1)?)?.as_ref()?;
        Some((self.text.lines().nth(line - 1)?, of_port))
    }
}
