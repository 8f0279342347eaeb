//! Whether this kernel can do what the backend needs: rules on connections in a bridge, and zones made of its name.

use nwfilter_rules::{ApplyError, Scope};

use crate::kernel::expr::{CtKey, Load, Relation};
use crate::kernel::{
    BaseChain, Chain, ChainType, Connection, Hook, Operation, Place, Policy, Rule, TableFlags, TableId,
    Transaction,
};
use crate::layout;

/// Whether rules on connections work in a bridge, by the kernel module nf_conntrack_bridge (Linux 5.3). The kernel loads it
/// to answer, and changes no table.
pub fn check() -> Result<(), ApplyError> {
    let table = TableId::bridge(layout::fixed("nwfilter-probe"));
    let base =
        BaseChain { kind: ChainType::Filter, hook: Hook::Prerouting, priority: 0, policy: Policy::Accept };
    let chain = Chain { name: layout::fixed("nwfilter-probe"), base: Some(base) };
    let state = Load::Ct { key: CtKey::State, direction: None };
    let rule = Rule::new().cmp(state, Relation::NotEqual, 0u32.to_ne_bytes());
    let zone = layout::zone_by_bridge();
    let mut transaction = Transaction::new();
    transaction.push(Operation::AddTable { table: table.clone(), flags: TableFlags::default() }, ());
    transaction.push(Operation::AddChain { table: table.clone(), chain: chain.clone() }, ());
    for rule in [rule, zone] {
        let (table, chain) = (table.clone(), chain.name.clone());
        transaction.push(Operation::AddRule { table, chain, place: Place::End, rule }, ());
    }
    let lacking = |error: &dyn std::error::Error| ApplyError::Unavailable {
        scope: Scope::IpRules,
        what: "tracking of bridged connections".into(),
        why: format!("this kernel has no nf_conntrack_bridge (Linux 5.3 and newer): {error}"),
    };
    let mut connection = Connection::open().map_err(|error| lacking(&error))?;
    connection.validate(&transaction).map_err(|error| lacking(&error))
}
