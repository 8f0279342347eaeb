//! The examples in the manual pages: the verb, a command line, and what it does.

/// At least one for each verb.
pub(super) const EXAMPLES: &[(&str, &str, &str)] = &[
    ("binding-create", "nwfilterctl binding-create vnet0.xml", "Filter the port that vnet0.xml names."),
    (
        "binding-create",
        "nwfilterctl binding-create --dry-run vnet0.xml vnet1.xml",
        "Show the rules that two ports would get.",
    ),
    (
        "binding-delete",
        "nwfilterctl binding-delete vnet0",
        "Stop filtering vnet0. Nothing of it stays in the kernel.",
    ),
    ("binding-dumpxml", "nwfilterctl binding-dumpxml vnet0", "Print the binding of vnet0."),
    (
        "binding-list",
        "nwfilterctl binding-list --json",
        "List ports, filters and learned addresses for a program.",
    ),
    (
        "check",
        "nwfilterctl check --strict filters/",
        "Check every document below filters/; a warning is an error.",
    ),
    ("config", "nwfilterctl config", "Show the settings, and in which line or variable each was set."),
    ("counters", "nwfilterctl counters vnet0", "Show how many packets each rule of vnet0 has matched."),
    (
        "counters",
        "nwfilterctl counters --filter web --watch",
        "Show every second what the rules of a filter match at all its ports.",
    ),
    ("define", "nwfilterctl define web.xml", "Store a filter and update the ports that use it."),
    ("define", "nwfilterctl define base.xml web.xml", "Store two filters, or neither."),
    ("diff", "nwfilterctl diff", "Show what somebody else has changed, rule by rule."),
    (
        "doctor",
        "nwfilterctl doctor",
        "Examine kernel, tools and other firewalls when guests are not filtered as they should be.",
    ),
    ("dumpxml", "nwfilterctl dumpxml clean-traffic", "Print a stock filter."),
    ("edit", "nwfilterctl edit web", "Open a filter in the editor, check it and store it."),
    (
        "explain",
        "nwfilterctl explain vnet0 in tcp to :443",
        "Say which rule decides about a new connection to the guest's port 443, and why.",
    ),
    ("export", "nwfilterctl export stores.json", "Write filters and bindings to one file."),
    ("fmt", "nwfilterctl fmt web.xml", "Print a filter in canonical form."),
    ("import", "nwfilterctl import --replace stores.json", "Take over filters and bindings, all or none."),
    (
        "keep",
        "nwfilterctl keep --metrics unix:/run/nwfilter/metrics",
        "Repair and learn until SIGTERM; serve metrics.",
    ),
    ("list", "nwfilterctl list", "List the filters of the store and the stock filters."),
    (
        "listen",
        "nwfilterctl listen --connect qemu:///system --guard vnet",
        "Filter the guests of a libvirt; ports whose names begin with vnet are closed until they are filtered.",
    ),
    (
        "plan",
        "nwfilterctl plan define web.xml",
        "Show what a new version of a filter would change, rule by rule.",
    ),
    ("plan", "nwfilterctl plan reload", "Show what a reload would repair."),
    ("reload", "nwfilterctl reload", "Bring the kernel to what the bindings ask for, as after a flush."),
    ("reload", "nwfilterctl reload --backend nftables", "Move all ports to the other backend."),
    (
        "render",
        "nwfilterctl render --binding vnet0.xml",
        "Print the rules of a binding without touching the kernel.",
    ),
    (
        "set-add",
        "nwfilterctl set-add admins 10.1.0.0/16 --comment 'branch office'",
        "Let a network in wherever filters let the set admins in. No rule is written.",
    ),
    (
        "set-define",
        "nwfilterctl set-define admins.xml",
        "Store a set, and bring what it holds into the kernel.",
    ),
    (
        "set-dumpxml",
        "nwfilterctl set-dumpxml --resolved web-servers",
        "Print all addresses that a set holds now, those of its tags' ports among them.",
    ),
    ("set-list", "nwfilterctl set-list", "List the sets."),
    (
        "set-remove",
        "nwfilterctl set-remove admins 10.1.0.0/16 --cut",
        "Take a network out of a set, and end its connections that rules on established ones would let go on.",
    ),
    (
        "set-replace",
        "nwfilterctl set-replace blocked --file blocked.txt",
        "Put the lines of a file in the place of all entries, at once.",
    ),
    ("set-undefine", "nwfilterctl set-undefine admins", "Remove a set that nobody uses."),
    ("status", "nwfilterctl status", "Show filters, ports and the kernel on one screen."),
    ("top", "nwfilterctl top -n 5", "Show the five rules, and the five ports, that stop most packets."),
    (
        "trace",
        "nwfilterctl trace vnet0 --for 10s",
        "Follow the packets of vnet0 for ten seconds, and show the rules that each matches.",
    ),
    (
        "trace",
        "nwfilterctl --json trace vnet0 --drops",
        "Log the packets of vnet0 that do not pass, a line of JSON for each, at most ten in a second.",
    ),
    ("undefine", "nwfilterctl undefine web", "Remove a filter that nobody uses."),
    ("users", "nwfilterctl users clean-traffic", "List the filters and ports that use a filter."),
    (
        "watch",
        "nwfilterctl watch --json",
        "Print what happens to filters and ports, a line of JSON for each event.",
    ),
];

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::EXAMPLES;
    use crate::cli::Cli;

    #[test]
    fn each_example_is_a_command_line_of_its_verb() {
        for (verb, line, _) in EXAMPLES {
            let words: Vec<_> = line.split_whitespace().collect();
            assert!(Cli::try_parse_from(&words).is_ok(), "{line}");
            assert!(words.contains(verb), "{line}");
        }
    }

    #[test]
    fn examples_are_sorted_by_verb() {
        assert!(EXAMPLES.iter().map(|(verb, ..)| verb).is_sorted());
    }
}
