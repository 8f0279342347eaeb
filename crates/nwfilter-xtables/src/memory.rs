//! Caches the contents of the tables, keyed by the kernel's generation of the ruleset.
//!
//! The save tools take more than a second for the rules of a thousand ports; asking the kernel for the generation takes
//! microseconds. A short-lived process can leave its cache in a file for the next process:
//!
//! ```text
//! tables of boot 5b3c9d2e-… namespace 4026 generation 12
//! # iptables
//! *filter
//! :FI-vnet0
//! -A FI-vnet0 -j DROP
//! # ebtables
//! …
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::{fs, thread};

use nwfilter_rules::ApplyError;

use crate::history::{Changes, Part};
use crate::nftables::{Generation, SharedHistory};
use crate::saved::{Saved, SavedTable};
use crate::steps::Step;
use crate::tool::{self, TableId, Tool};

/// The contents of this backend's tables.
pub(crate) type Tables = BTreeMap<TableId, SavedTable>;

/// The tables as they were last read or written.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    tables: Tables,
    /// The state of the kernel they belong to. `None` if they must be read again.
    state: Option<Generation>,
    /// The file for the next process, and the state that the file has.
    file: Option<(PathBuf, Option<Generation>)>,
    /// Changes of others, recorded while a watch exists.
    history: SharedHistory,
}

impl Memory {
    /// A cache that starts with the contents of a file, and writes them back.
    pub(crate) fn in_file(file: PathBuf) -> Self {
        Self { file: Some((file, None)), ..Self::default() }
    }

    /// The current tables in the network namespace of the calling thread.
    pub(crate) fn tables(&mut self) -> Result<&Tables, ApplyError> {
        let before = Generation::now().ok();
        if before.is_none() || before != self.state {
            let known = self.state.take();
            if let Some(tables) = before.and_then(|state| self.recall(state)) {
                (self.tables, self.state) = (tables, before);
                return Ok(&self.tables);
            }
            match known.zip(before).and_then(|(known, now)| self.changed(known, now)) {
                Some(changes) => self.read_changes(changes)?,
                None => self.tables = read(&Tool::ALL.into())?,
            }
            // The kernel does not count changes by the legacy variants.
            let counted = !Tool::ALL.into_iter().any(|tool| tool::is_legacy(tool).unwrap_or(true));
            // A change during the reading makes the next call read again.
            self.state = before.filter(|before| counted && Generation::now().is_ok_and(|now| now == *before));
        }
        Ok(&self.tables)
    }

    /// Applies committed steps to the cached tables. If others changed anything since the last [`Self::tables`], the next call
    /// reads the tables again.
    pub(crate) fn committed(&mut self, steps: &[Step]) {
        let Some(known) = &mut self.state else { return };
        // A restore tool makes one transaction, and so one generation, for each table it changes.
        let commits = u32::try_from(steps.iter().map(Vec::len).sum::<usize>()).unwrap_or(u32::MAX);
        known.number = known.number.wrapping_add(commits);
        let known = *known;
        if !Generation::now().is_ok_and(|now| now == known) {
            self.state = None;
            return;
        }
        for plan in steps.iter().flatten() {
            plan.carry_out(self.tables.entry(plan.table()).or_default());
        }
        self.leave(known);
    }

    /// Makes the next call read the tables again.
    pub(crate) fn forget(&mut self) {
        self.state = None;
        // The file is wrong too.
        if let Some((file, held)) = &mut self.file {
            let _ = fs::remove_file(file);
            *held = None;
        }
    }

    /// What others changed since the cached state. `None` if the history is incomplete.
    fn changed(&self, since: Generation, now: Generation) -> Option<Changes> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).changed(since, now)
    }

    /// Reads what others changed: single chains if they are few, else whole tables.
    fn read_changes(&mut self, Changes(changes): Changes) -> Result<(), ApplyError> {
        let mut anew = BTreeSet::new();
        for (table, part) in changes {
            let lists = match part {
                Part::Chains(chains) => lists(table, chains),
                Part::Whole => None,
            };
            match lists {
                Some(lists) => self.tables.entry(table).or_default().extend(lists),
                None => drop(anew.insert(table.tool())),
            }
        }
        self.tables.extend(read(&anew)?);
        Ok(())
    }

    /// Where a watch records the changes of others.
    pub(crate) fn history(&self) -> SharedHistory {
        self.history.clone()
    }

    /// The tables that another process left in the file, if they are of this state.
    fn recall(&mut self, state: Generation) -> Option<Tables> {
        let (file, held) = self.file.as_mut()?;
        let text = fs::read_to_string(file).ok()?;
        let tables = read_file(&text, &heading(state)?)?;
        *held = Some(state);
        Some(tables)
    }

    /// Writes the tables, which are of this state, to the file. If that fails, the next process reads the kernel's.
    fn leave(&mut self, state: Generation) {
        let Some((file, held)) = self.file.as_mut().filter(|(_, held)| *held != Some(state)) else { return };
        let Some(heading) = heading(state) else { return };
        match write_file(file, &format!("{heading}\n{}", Text(&self.tables))) {
            Ok(()) => *held = Some(state),
            Err(error) => log::debug!("{}: {error}", file.display()),
        }
    }
}

/// The first line of the file, unique for each state. `None` if the kernel has no boot id.
fn heading(Generation { namespace, number }: Generation) -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(format!("tables of boot {} namespace {namespace} generation {number}", boot.trim()))
}

/// The contents of the file.
struct Text<'a>(&'a Tables);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tool in Tool::ALL {
            writeln!(f, "# {}", tool.name())?;
            for (table, chains) in self.0.iter().filter(|(table, _)| table.tool() == tool) {
                writeln!(f, "*{}", table.name())?;
                chains.keys().try_for_each(|chain| writeln!(f, ":{chain}"))?;
                for (chain, rules) in chains {
                    rules.iter().try_for_each(|rule| writeln!(f, "-A {chain} {rule}"))?;
                }
            }
        }
        f.write_str("# end\n")
    }
}

/// The tables in a file. `None` if they are of another state.
fn read_file(text: &str, heading: &str) -> Option<Tables> {
    let mut rest = text.strip_prefix(heading)?.strip_prefix('\n')?;
    let mut tables = Tables::new();
    for tool in Tool::ALL {
        rest = rest.strip_prefix("# ")?.strip_prefix(tool.name())?.strip_prefix('\n')?;
        let end = rest.find("\n# ")? + 1;
        tables.extend(tables_of(tool, &rest[..end]));
        rest = &rest[end..];
    }
    (rest == "# end\n").then_some(tables)
}

fn write_file(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    // The driver removes files of this name if this process is killed.
    let mut file = tempfile::Builder::new().prefix(".nwfilter-").suffix(".new").tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// The rules of some chains. `None` if one cannot be listed, for example because it was deleted meanwhile.
fn lists(table: TableId, chains: BTreeSet<String>) -> Option<Vec<(String, Vec<String>)>> {
    let list = |chain: String| tool::list(table, &chain).ok().flatten().map(|rules| (chain, rules));
    chains.into_iter().map(list).collect()
}

/// Runs one function for each tool in parallel, in the network namespace of the calling thread.
fn read(tools: &BTreeSet<Tool>) -> Result<Tables, ApplyError> {
    let texts: Vec<_> = thread::scope(|scope| {
        let start = |tool: &Tool| {
            let tool = *tool;
            (tool, thread::Builder::new().spawn_scoped(scope, move || tool::save(tool)))
        };
        let readers: Vec<_> = tools.iter().map(start).collect();
        let text = |(tool, reader): (Tool, io::Result<thread::ScopedJoinHandle<'_, _>>)| match reader {
            Ok(reader) => (tool, reader.join().unwrap_or_else(|panic| resume_unwind(panic))),
            // If no thread can be started, the tools are run one after the other.
            Err(_) => (tool, tool::save(tool)),
        };
        readers.into_iter().map(text).collect()
    });
    let mut tables = Tables::new();
    for (tool, text) in texts {
        tables.extend(tables_of(tool, &text?));
    }
    Ok(tables)
}

/// This backend's tables in the output of a save tool.
fn tables_of(tool: Tool, text: &str) -> Tables {
    let mut saved = Saved::parse(text);
    let of_tool = TableId::ALL.into_iter().filter(|table| table.tool() == tool);
    of_tool.map(|table| (table, saved.take(table.name()))).collect()
}

#[cfg(test)]
mod tests {
    use nwfilter_testlab::{Host, Need, skip_unless};

    use super::*;

    #[test]
    fn a_chain_that_is_listed_has_the_rules_that_it_is_saved_with() {
        skip_unless!(Need::Root, Need::Tool("iptables"), Need::Tool("ebtables"));
        let host = Host::new().unwrap();
        let ip = "*filter\n:x - [0:0]\n-A x -s 10.0.0.1/32 -p tcp -m tcp --sport 1:2 ! --dport 3 -j RETURN\n\
                  -A x -p icmp -m icmp --icmp-type 8/0 -m comment --comment \"it's a \\\"test\\\"  # \" -j ACCEPT\n\
                  -A x -m conntrack --ctstate NEW,ESTABLISHED -m conntrack --ctdir ORIGINAL -j RETURN\n\
                  -A FORWARD -m physdev --physdev-out a0 --physdev-is-bridged -g x\n-A x -j DROP\nCOMMIT\n";
        let ethernet = "*nat\n:x ACCEPT\n:y RETURN\n-A PREROUTING -s ! 52:54:00:00:00:01 -j DROP\n\
                        -A PREROUTING -p ARP --arp-op 3 --arp-mac-src 2:4:6:8:a:c --arp-ip-dst 10.0.0.0/8 -j RETURN\n\
                        -A PREROUTING -p IPv4 --ip-src ! 10.0.0.1 --ip-proto 17 --ip-dport 67:68 -j y\n\
                        -A PREROUTING -p IPv6 --ip6-proto 58 --ip6-icmp-type 128:129/0 -j y\n\
                        -A PREROUTING -d BGA --stp-type 0 --stp-root-prio 1:2 -j DROP\n\
                        -A PREROUTING -p 802_1Q --vlan-id 5 --vlan-encap 0x0806 -j CONTINUE\n\
                        -A PREROUTING -p 0x88cc -j ACCEPT\n-A POSTROUTING -o a+ -j x\n";
        host.run_with_stdin(&["iptables-restore", "--noflush"], ip).unwrap();
        host.run_with_stdin(
            &["ip6tables-restore", "--noflush"],
            &ip.replace("10.0.0.1/32", "fe80::1/128")
                .replace("icmp -m icmp --icmp-type 8/0", "ipv6-icmp -m icmp6 --icmpv6-type 128"),
        )
        .unwrap();
        host.run_with_stdin(&["ebtables-restore", "--noflush"], ethernet).unwrap();
        let saved = host.enter(|| read(&Tool::ALL.into())).unwrap();
        let begin = host.enter(Generation::now).unwrap();
        let mut listed = 0;
        for (table, chains) in &saved {
            for (chain, saved) in chains {
                if let Some(rules) = host.enter(|| tool::list(*table, chain)).unwrap() {
                    assert_eq!(rules, *saved, "{table:?} {chain}");
                    listed += rules.len();
                }
            }
        }
        assert_eq!(listed, 2 * 5 + 8);
        assert_eq!(host.enter(Generation::now).unwrap(), begin, "nothing was written");
        let missing = host.enter(|| tool::list(TableId::IptablesFilter, "z")).unwrap_err();
        assert!(missing.to_string().starts_with("iptables: "), "{missing}");
    }

    #[test]
    fn a_file_is_read_as_it_was_written_and_not_at_all_when_it_was_not() {
        let mut tables = tables_of(Tool::Iptables, "");
        tables.extend(tables_of(Tool::Ip6tables, "*raw\n:CT-a - [0:0]\n*filter\n"));
        tables.extend(tables_of(
            Tool::Ebtables,
            "*nat\n:x ACCEPT\n:libvirt-I-a ACCEPT\n-A libvirt-I-a -j x\n-A x -s 1:2:3:4:5:6 -j DROP\n",
        ));
        let text = format!("heading\n{}", Text(&tables));
        assert_eq!(read_file(&text, "heading"), Some(tables));
        assert_eq!(read_file(&text, "head"), None);
        assert_eq!(read_file(&text, "heading of another"), None);
        for end in 0..text.len() {
            assert_eq!(read_file(&text[..end], "heading"), None, "{}", &text[..end]);
        }
    }
}
