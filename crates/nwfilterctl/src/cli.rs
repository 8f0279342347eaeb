//! The syntax of the command line.

use std::path::PathBuf;

use crate::counters::{Counters, Top};
use crate::explain::Explain;
use crate::trace::TracePort;
use clap::{Args, Parser, Subcommand, ValueEnum};
use nwfilterctl_shared::{Arguments, DaemonOptions, ListenOptions};

/// Filters the traffic of guests as libvirt's nwfilter documents say.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) arguments: Arguments,
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Change nothing, but show what the verb would change, as `plan` does
    #[arg(long, global = true)]
    pub(crate) dry_run: bool,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// A file `-` is standard input, and a filter's NAME may be its UUID.
#[derive(Subcommand)]
pub(crate) enum Verb {
    #[command(flatten)]
    Change(Change),
    /// Show what a verb would change in the stores and, rule by rule, in the kernel
    Plan {
        #[command(subcommand)]
        change: Change,
    },
    /// Open a filter in $VISUAL or $EDITOR and define the result
    Edit {
        name: String,
    },
    /// List the filters of the store and the stock filters
    List,
    /// Print a filter in canonical form
    Dumpxml {
        name: String,
    },
    /// List the filters and ports that use a filter
    Users {
        name: String,
    },
    /// List the ports that have a binding
    BindingList,
    /// Show the settings of this host, and where each comes from
    Config,
    /// Show filters, ports and the kernel on one screen; exit 1 if the kernel is not as it should be
    Status,
    /// Print what changes in the stores and in the kernel, as it happens, whoever changes it
    Watch,
    /// Write the stores to a file, or print them, for `import`
    Export {
        file: Option<PathBuf>,
    },
    /// Find what on this host keeps guests from being filtered, and say what to do; exit 1 if there is a problem
    Doctor,
    /// List the sets
    SetList,
    /// Print a set in canonical form
    SetDumpxml {
        name: String,
        /// Print the whole content, with includes and with the addresses of tagged ports
        #[arg(long)]
        resolved: bool,
    },
    /// Print a port's binding in canonical form
    BindingDumpxml {
        port: String,
    },
    /// Read documents and show every problem in them; directories are searched for *.xml
    Check {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Treat warnings (what libvirt ignores or replaces) as errors
        #[arg(long)]
        strict: bool,
        /// Warn about unknown elements and attributes in rules instead of refusing them
        #[arg(long)]
        as_libvirt: bool,
    },
    /// Print filters and bindings in canonical form, as virsh nwfilter-dumpxml does
    Fmt {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Print the rules of a binding without touching the kernel
    Render {
        /// The binding
        #[arg(long, value_name = "FILE")]
        binding: PathBuf,
        /// The restore tools' input, or the typed ruleset
        #[arg(long, default_value = "restore")]
        format: RenderFormat,
    },
    Explain(Explain),
    Trace(TracePort),
    Counters(Counters),
    Top(Top),
    /// Compare the kernel with what the bindings ask for; exit 1 if they differ
    Diff,
    /// Apply all bindings, then repair what others change and learn addresses until SIGTERM. Prints what happens
    Keep(DaemonOptions),
    /// Keep the bindings in step with the guests of a libvirt, until SIGTERM
    Listen(ListenOptions),
    /// Learn the addresses of guests until none is left to learn
    #[command(hide = true)]
    Learn,
    /// Write the manual pages and the completions of shells into a directory
    #[command(hide = true)]
    Manuals {
        directory: PathBuf,
    },
}

/// The verbs that change stores or kernel.
#[derive(Subcommand)]
pub(crate) enum Change {
    /// Store filters, all or none, replacing those of the same names, and update the ports that use them
    Define {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Accept rules with unknown elements and attributes; they match more than is written
        #[arg(long)]
        as_libvirt: bool,
        #[command(flatten)]
        cut: CutOption,
    },
    /// Remove filters from the store, all or none
    Undefine {
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Filter ports, all or none
    BindingCreate {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        cut: CutOption,
    },
    /// Stop filtering ports, all or none
    BindingDelete {
        #[arg(required = true, value_name = "PORT")]
        ports: Vec<String>,
    },
    /// Store and enforce the content of a file that `export` wrote, all or nothing
    Import(Import),
    /// Apply all bindings to the kernel
    Reload,
    #[command(flatten)]
    Set(SetChange),
}

/// The verbs that change sets.
#[derive(Subcommand)]
#[allow(clippy::enum_variant_names)] // The variants are the names of the verbs.
pub(crate) enum SetChange {
    /// Store sets, all or none, replacing those of the same names
    SetDefine {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        cut: CutOption,
    },
    /// Remove unused sets from the store, all or none
    SetUndefine {
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Add entries to a set, all or none
    SetAdd {
        name: String,
        #[arg(required = true, value_name = "ENTRY")]
        entries: Vec<String>,
        /// A comment for the entries
        #[arg(long)]
        comment: Option<String>,
    },
    /// Remove entries from a set, all or none
    SetRemove {
        name: String,
        #[arg(required = true, value_name = "ENTRY")]
        entries: Vec<String>,
        #[command(flatten)]
        cut: CutOption,
    },
    /// Replace the entries of a set with those of a file, one entry a line
    SetReplace {
        name: String,
        /// The file; `#` begins a comment
        #[arg(long)]
        file: PathBuf,
        #[command(flatten)]
        cut: CutOption,
    },
}

/// The option of verbs that may make rules stricter.
#[derive(Args)]
pub(crate) struct CutOption {
    /// Also end the connections of the ports concerned that could not begin by the new rules; exit 1 if others may go on
    #[arg(long)]
    pub(crate) cut: bool,
}

/// The options of `import`.
#[derive(Args)]
pub(crate) struct Import {
    /// The file
    pub(crate) file: PathBuf,
    /// Replace stored documents of the same names
    #[arg(long)]
    pub(crate) replace: bool,
    /// Do not import bindings
    #[arg(long)]
    pub(crate) filters_only: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RenderFormat {
    Restore,
    Json,
}
