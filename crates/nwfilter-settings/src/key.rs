//! The table of settings: the name of each, what it takes, and what holds where nobody sets it.

use std::net::IpAddr;

/// What a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The absolute path of a directory.
    Directory,
    /// One of these words.
    Word(&'static [&'static str]),
    /// `true` or `false`.
    Switch,
    /// A number of seconds, up to a day.
    Seconds,
    /// The number of a group of the kernel's packet log.
    Group,
    /// A list of IP addresses, which a text has with commas between them.
    Addresses,
    /// Any text that is not empty.
    Text,
}

/// The longest wait in seconds that can be set.
pub const MAX_SECONDS: u64 = 24 * 60 * 60;

macro_rules! keys {
    ($($key:ident $name:literal $variable:literal $kind:expr, $default:expr, $about:literal;)*) => {
        /// A setting.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Key {
            $(#[doc = $about] $key,)*
        }

        impl Key {
            /// All of them, sorted by name.
            pub const ALL: &'static [Key] = &[$(Key::$key,)*];

            /// Its name in the file; the option of the command line has the same.
            pub fn name(self) -> &'static str {
                match self { $(Key::$key => $name,)* }
            }

            /// The environment variable that comes before the file.
            pub fn variable(self) -> &'static str {
                match self { $(Key::$key => $variable,)* }
            }

            /// What it takes.
            pub fn kind(self) -> Kind {
                match self { $(Key::$key => $kind,)* }
            }

            /// What holds where nobody sets it; `None` where nothing does.
            pub fn default(self) -> Option<&'static str> {
                match self { $(Key::$key => $default,)* }
            }

            /// What it decides, in a sentence.
            pub fn about(self) -> &'static str {
                match self { $(Key::$key => $about,)* }
            }
        }
    };
}

keys! {
    Backend "backend" "NWFILTER_BACKEND" Kind::Word(&["auto", "nftables", "xtables"]), Some("xtables"),
        "What enforces the rules";
    ConfigDir "config-dir" "NWFILTER_CONFIG_DIR" Kind::Directory, Some("/etc/nwfilter"),
        "The filter store";
    Connect "connect" "NWFILTER_CONNECT" Kind::Text, None,
        "The URI of the libvirt that `listen` follows; without one, libvirt's own default";
    Dispatch "dispatch" "NWFILTER_DISPATCH" Kind::Word(&["tree", "list"]), None,
        "How packets find their port; without a word a tree, but libvirt's own stores keep what is there";
    Guard "guard" "NWFILTER_GUARD" Kind::Text, None,
        "`listen` closes bridge ports whose name starts so until they have a binding";
    Helpers "helpers" "NWFILTER_HELPERS" Kind::Switch, Some("true"),
        "Whether connections get conntrack helpers";
    KeepBridgeNf "keep-bridge-nf" "NWFILTER_KEEP_BRIDGE_NF" Kind::Switch, Some("false"),
        "Whether IP rules are refused where bridge-nf-call-iptables is off, instead of switching it on";
    LearningServers "learning.dhcp-servers" "NWFILTER_LEARNING_DHCP_SERVERS" Kind::Addresses, None,
        "The DHCP servers whose answers count for bindings without DHCPSERVER; without it, all";
    LearningMethod "learning.method" "NWFILTER_LEARNING_METHOD" Kind::Word(&["any", "dhcp", "none"]), Some("any"),
        "How addresses are learned for bindings without CTRL_IP_LEARNING";
    Log "log" "NWFILTER_LOG" Kind::Word(&["error", "warn", "info", "debug", "trace"]), None,
        "The least level that is logged; without one, info for daemons and warn for all else";
    LogGroup "log-group" "NWFILTER_LOG_GROUP" Kind::Group, Some("7410"),
        "The group of the kernel's packet log for what ports with CTRL_LOG_DROPS drop";
    Metrics "metrics" "NWFILTER_METRICS" Kind::Text, None,
        "Where daemons serve metrics: HOST:PORT or unix:PATH; without it, nowhere";
    StateDir "state-dir" "NWFILTER_STATE_DIR" Kind::Directory, Some("/run/nwfilter"),
        "The binding store";
    Timeout "timeout" "NWFILTER_TIMEOUT" Kind::Seconds, None,
        "A change gives up after so many seconds if another process keeps the stores locked; without it, it waits";
}

impl Key {
    /// The setting of this name.
    pub fn from_name(name: &str) -> Option<Key> {
        Key::ALL.iter().copied().find(|key| key.name() == name)
    }

    /// Whether it is in the table of this name.
    pub(crate) fn is_in_table(self, table: &str) -> bool {
        self.name().split_once('.').is_some_and(|(name, _)| name == table)
    }

    /// The name nearest to one that does not exist, if one is near.
    pub(crate) fn nearest(name: &str) -> Option<&'static str> {
        let name = name.replace('_', "-");
        let near = |key: &Key| (strsim::osa_distance(&name, key.name()), key.name());
        let (distance, nearest) = Key::ALL.iter().map(near).min()?;
        (distance <= nearest.len().div_ceil(3)).then_some(nearest)
    }

    /// What it takes, for messages.
    pub(crate) fn expected(self) -> String {
        match self.kind() {
            Kind::Directory => "the absolute path of a directory".to_owned(),
            Kind::Word(words) => match words {
                [others @ .., last] => format!("{} or {last}", others.join(", ")),
                [] => String::new(),
            },
            Kind::Switch => "true or false".to_owned(),
            Kind::Addresses => "a list of IP addresses".to_owned(),
            Kind::Group => format!("a number from 0 to {}", u16::MAX),
            Kind::Seconds => format!("a number of seconds from 0 to {MAX_SECONDS}"),
            Kind::Text => "a text that is not empty".to_owned(),
        }
    }

    /// Whether it takes this value.
    pub(crate) fn takes(self, value: &str) -> bool {
        match self.kind() {
            Kind::Directory => value.starts_with('/'),
            Kind::Word(words) => words.contains(&value),
            Kind::Switch => matches!(value, "true" | "false"),
            Kind::Seconds => value.parse().is_ok_and(|seconds: u64| seconds <= MAX_SECONDS),
            Kind::Addresses => value.split(',').all(|address| address.trim().parse::<IpAddr>().is_ok()),
            Kind::Group => value.parse::<u16>().is_ok(),
            Kind::Text => !value.is_empty(),
        }
    }
}
