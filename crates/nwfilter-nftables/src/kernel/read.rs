//! Reads a table back into the types that it was written from.

use std::collections::BTreeMap;

use nix::libc;

use super::batch::{
    CHAIN_HOOK, CHAIN_NAME, CHAIN_POLICY, CHAIN_TABLE, CHAIN_TYPE, F_DORMANT, F_OWNER, F_PERSIST,
    HELPER_L3PROTO, HELPER_L4PROTO, HELPER_NAME, HOOK_NUMBER, HOOK_PRIORITY, HOOKS, OBJ_DATA, OBJ_NAME,
    OBJ_TABLE, OBJ_TYPE, OBJ_USERDATA, RULE_CHAIN, RULE_EXPRESSIONS, RULE_HANDLE, RULE_TABLE, RULE_USERDATA,
    TABLE_FLAGS, TABLE_NAME, family_number,
};
use super::connection::Connection;
use super::error::Error;
use super::expr::ObjectKind;
use super::expr_wire::{LIST_ELEM, read_exprs, read_object_kind};
use super::installed::{InstalledChain, InstalledRule, InstalledSet, InstalledTable};
use super::name::{ChainName, ObjectName, SetName};
use super::rule::Rule;
use super::set::Set;
use super::set_wire::{LIST_SET, LIST_TABLE, SET_TABLE, elements, join, read_part, read_set};
use super::table::{BaseChain, Chain, ChainType, CtHelper, Object, Policy, TableFlags, TableId};
use super::udata;
use super::wire::{Attributes, malformed, missing};

/// `NFTA_TABLE_OWNER`
const TABLE_OWNER: u16 = 7;

/// Reads a table; `None` where there is none.
pub(super) fn table(
    connection: &mut Connection,
    table: &TableId,
    generation: u32,
) -> Result<Option<InstalledTable>, Error> {
    let Some((flags, owner)) = head(connection, table)? else { return Ok(None) };
    let chains = chains_with_rules(connection, table)?;
    let mut installed = BTreeMap::new();
    for set in sets(connection, table)? {
        let elements = set_elements(connection, table, &set)?;
        installed.insert(set.name.clone(), InstalledSet { set, elements });
    }
    let objects = objects(connection, table)?;
    Ok(Some(InstalledTable { generation, flags, owner, chains, sets: installed, objects }))
}

/// The chains of a table with their rules.
pub(super) fn chains_with_rules(
    connection: &mut Connection,
    table: &TableId,
) -> Result<BTreeMap<ChainName, InstalledChain>, Error> {
    let mut chains = chains(connection, table)?;
    rules(connection, table, &mut chains)?;
    Ok(chains)
}

/// The flags and the owner of a table.
pub(super) fn head(
    connection: &mut Connection,
    table: &TableId,
) -> Result<Option<(TableFlags, Option<u32>)>, Error> {
    let mut head = None;
    let asked = connection.ask(
        libc::NFT_MSG_GETTABLE,
        family_number(table.family),
        0,
        |w| w.put_str(TABLE_NAME, table.name.as_str()),
        |_, attributes| {
            let bits = attributes.u32(TABLE_FLAGS).unwrap_or(0);
            let flags = TableFlags {
                dormant: bits & F_DORMANT != 0,
                owner: bits & F_OWNER != 0,
                persist: bits & F_PERSIST != 0,
            };
            head = Some((flags, attributes.u32(TABLE_OWNER).filter(|owner| *owner != 0)));
            Ok(())
        },
    );
    match asked {
        Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        other => other.map(|()| head),
    }
}

/// Asks for all of a kind; hands on what is of the table.
fn dump(
    connection: &mut Connection,
    table: &TableId,
    kind: i32,
    table_attribute: u16,
    set: Option<&SetName>,
    mut each: impl FnMut(Attributes<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let number = family_number(table.family);
    connection.ask(
        kind,
        number,
        libc::NLM_F_DUMP,
        |w| {
            // The kernel looks at it only where there may be much.
            w.put_str(table_attribute, table.name.as_str());
            if let Some(set) = set {
                w.put_str(LIST_SET, set.as_str());
            }
        },
        |family, attributes| {
            let ours = family == number && attributes.str(table_attribute) == Some(table.name.as_str());
            if ours { each(attributes) } else { Ok(()) }
        },
    )
}

fn chains(
    connection: &mut Connection,
    table: &TableId,
) -> Result<BTreeMap<ChainName, InstalledChain>, Error> {
    let mut chains = BTreeMap::new();
    dump(connection, table, libc::NFT_MSG_GETCHAIN, CHAIN_TABLE, None, |attributes| {
        let name: ChainName = attributes.name(CHAIN_NAME, "chain")?;
        let base = attributes.nested(CHAIN_HOOK).map(|hook| read_base(attributes, hook)).transpose()?;
        let chain = Chain { name: name.clone(), base };
        chains.insert(name, InstalledChain { chain, rules: Vec::new() });
        Ok(())
    })?;
    Ok(chains)
}

/// The names of the chains of a table, whoever's it is.
pub(super) fn chain_names(connection: &mut Connection, table: &TableId) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    dump(connection, table, libc::NFT_MSG_GETCHAIN, CHAIN_TABLE, None, |attributes| {
        names.extend(attributes.str(CHAIN_NAME).map(String::from));
        Ok(())
    })?;
    Ok(names)
}

fn read_base(chain: Attributes<'_>, hook: Attributes<'_>) -> Result<BaseChain, Error> {
    if chain.str(CHAIN_TYPE) != Some("filter") {
        return Err(malformed("a base chain of another type than filter"));
    }
    let number = hook.need_u32(HOOK_NUMBER, "hook")? as usize;
    Ok(BaseChain {
        kind: ChainType::Filter,
        hook: *HOOKS.get(number).ok_or_else(|| malformed(format!("hook {number}")))?,
        priority: hook.need_u32(HOOK_PRIORITY, "priority")?.cast_signed(),
        policy: match chain.u32(CHAIN_POLICY).map(u32::cast_signed) {
            Some(libc::NF_DROP) => Policy::Drop,
            _ => Policy::Accept,
        },
    })
}

fn rules(
    connection: &mut Connection,
    table: &TableId,
    chains: &mut BTreeMap<ChainName, InstalledChain>,
) -> Result<(), Error> {
    dump(connection, table, libc::NFT_MSG_GETRULE, RULE_TABLE, None, |attributes| {
        let name: ChainName = attributes.name(RULE_CHAIN, "chain of a rule")?;
        let mut counts = Vec::new();
        let list = attributes.nested(RULE_EXPRESSIONS).unwrap_or(Attributes(&[]));
        let rule = Rule {
            exprs: read_exprs(list, &mut counts)?,
            comment: attributes.get(RULE_USERDATA).and_then(udata::rule_comment),
        };
        let handle = attributes.u64(RULE_HANDLE).ok_or_else(|| missing("handle of a rule"))?;
        // A chain that came since the chains were read: the generation is another one then.
        if let Some(chain) = chains.get_mut(&name) {
            chain.rules.push(InstalledRule { handle, rule, counts });
        }
        Ok(())
    })
}

fn sets(connection: &mut Connection, table: &TableId) -> Result<Vec<Set>, Error> {
    let mut sets = Vec::new();
    dump(connection, table, libc::NFT_MSG_GETSET, SET_TABLE, None, |attributes| {
        sets.extend(read_set(attributes)?);
        Ok(())
    })?;
    Ok(sets)
}

fn set_elements(
    connection: &mut Connection,
    table: &TableId,
    set: &Set,
) -> Result<Vec<super::installed::InstalledElement>, Error> {
    let mut parts = Vec::new();
    dump(connection, table, libc::NFT_MSG_GETSETELEM, LIST_TABLE, Some(&set.name), |attributes| {
        let Some(list) = elements(attributes) else { return Ok(()) };
        for element in list.all(LIST_ELEM) {
            parts.extend(read_part(set, element)?);
        }
        Ok(())
    })?;
    join(set, parts)
}

fn objects(connection: &mut Connection, table: &TableId) -> Result<BTreeMap<ObjectName, Object>, Error> {
    let mut objects = BTreeMap::new();
    dump(connection, table, libc::NFT_MSG_GETOBJ, OBJ_TABLE, None, |attributes| {
        let kind = attributes.u32(OBJ_TYPE).and_then(read_object_kind);
        let (Some(ObjectKind::CtHelper), Some(data)) = (kind, attributes.nested(OBJ_DATA)) else {
            return Ok(());
        };
        let name: ObjectName = attributes.name(OBJ_NAME, "object")?;
        let helper = CtHelper {
            name: name.clone(),
            helper: data.str(HELPER_NAME).unwrap_or_default().into(),
            protocol: data.u8(HELPER_L4PROTO).unwrap_or(0),
            l3proto: data.u16(HELPER_L3PROTO),
            comment: attributes.get(OBJ_USERDATA).and_then(udata::object_comment),
        };
        objects.insert(name, Object::CtHelper(helper));
        Ok(())
    })?;
    Ok(objects)
}
