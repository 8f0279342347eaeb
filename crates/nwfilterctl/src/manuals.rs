//! `manuals`: writes the manual pages of all verbs and the scripts for completion, which packages install.

mod examples;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use nwfilter_settings::{FILE, Key, Kind};

use crate::cli::Cli;
use crate::complete;
use crate::manuals::examples::EXAMPLES;

/// The section of system administration commands.
const SECTION: &str = "8";
const MANUAL: &str = "nwfilter";

const FILES: [(&str, &str); 4] = [
    (FILE, "The settings of the host, nwfilter.toml(5)."),
    ("/etc/nwfilter/*.xml", "The filter store."),
    ("/run/nwfilter/*.xml", "The binding store."),
    (
        "/run/nwfilter/learn.log",
        "What was learned about the addresses of guests, and what went wrong with it.",
    ),
];

const EXIT_STATUS: [(&str, &str); 3] = [
    ("0", "Done."),
    ("1", "Refused, or the verb found something: a difference, or a mistake in a document."),
    ("2", "Wrong usage."),
];

/// Writes `man/*` and `completions/SHELL/*` below a directory.
pub(crate) fn manuals(directory: &Path) -> Result<()> {
    let mut files = pages(Cli::command())?;
    for (shell, file, text) in complete::scripts()? {
        files.push((format!("completions/{shell}/{file}"), text));
    }
    for (name, text) in files {
        let path = directory.join(name);
        let write = || {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&path, text)
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn pages(mut program: Command) -> Result<Vec<(String, Vec<u8>)>> {
    program.build();
    let mut pages = vec![page(&program, "nwfilterctl", false)?];
    for verb in program.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        let name = format!("nwfilterctl-{}", verb.get_name());
        // Options of every verb are described in the page of the program only.
        let verb = verb.clone().mut_args(|arg| {
            let is_global = arg.is_global_set();
            arg.hide(is_global)
        });
        pages.push(page(&verb, &name, true)?);
    }
    pages.push(("man/nwfilter.toml.5".to_owned(), settings_page().into_bytes()));
    Ok(pages)
}

/// The page of the program or of a verb.
fn page(command: &Command, name: &str, is_verb: bool) -> Result<(String, Vec<u8>)> {
    let version = concat!("nwfilterctl ", env!("CARGO_PKG_VERSION"));
    let shown = command.clone().display_name(name.to_owned()).version(None);
    let man = Man::new(shown).section(SECTION).title(name).source(version).manual(MANUAL);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    let has_options = command.get_arguments().any(|arg| !arg.is_hide_set());
    if has_options {
        man.render_options_section(&mut text)?;
    }
    if is_verb {
        if !has_options {
            text.extend(b".SH OPTIONS\n");
        }
        text.extend(b".PP\nThe options of \\fBnwfilterctl\\fR(8) can be given too.\n");
    }
    if command.has_subcommands() {
        section(&mut text, "VERBS", &verbs(command, is_verb))?;
    }
    let examples = EXAMPLES.iter().filter(|(verb, ..)| is_verb && *verb == command.get_name());
    section(&mut text, "EXAMPLES", &examples.map(|(_, line, what)| (*line, *what)).collect::<Vec<_>>())?;
    if !is_verb {
        section(&mut text, "FILES", &FILES)?;
        let variables: Vec<_> = Key::ALL.iter().map(|key| (key.variable(), key.about())).collect();
        section(&mut text, "ENVIRONMENT", &variables)?;
    }
    section(&mut text, "EXIT STATUS", &EXIT_STATUS)?;
    text.extend(b".SH SEE ALSO\n");
    text.extend(if is_verb { &b"\\fBnwfilterctl\\fR(8), "[..] } else { b"" });
    text.extend(b"\\fBnwfilter.toml\\fR(5), \\fBiptables\\fR(8), \\fBebtables\\fR(8), \\fBnft\\fR(8)\n");
    Ok((format!("man/{name}.{SECTION}"), text))
}

fn verbs(command: &Command, is_verb: bool) -> Vec<(String, String)> {
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help");
    let reference = if is_verb { "" } else { "(8)" };
    verbs
        .map(|verb| {
            let about = verb.get_about().map(|about| format!("{about}."));
            let name =
                if is_verb { verb.get_name().to_owned() } else { format!("nwfilterctl-{}", verb.get_name()) };
            (format!("{name}{reference}"), about.unwrap_or_default())
        })
        .collect()
}

fn section(text: &mut Vec<u8>, title: &str, items: &[(impl AsRef<str>, impl AsRef<str>)]) -> Result<()> {
    if !items.is_empty() {
        writeln!(text, ".SH {title}")?;
    }
    for (item, what) in items {
        writeln!(text, ".TP\n\\fB{}\\fR\n{}", escaped(item.as_ref()), escaped(what.as_ref()))?;
    }
    Ok(())
}

/// Escapes text for troff.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq").replace('`', "");
    if text.starts_with('.') { format!("\\&{text}") } else { text }
}

/// The page of the file of settings.
fn settings_page() -> String {
    let mut text = format!(
        ".TH nwfilter.toml 5 \"\" \"nwfilterctl {}\" \"{MANUAL}\"\n.SH NAME\nnwfilter.toml \\- the settings of a host that filters \
         guests\n.SH SYNOPSIS\n\\fB{FILE}\\fR\n.SH DESCRIPTION\nA TOML file with one key for each setting. An environment variable \
         comes before the file, an option of the command line before both. A key that does not exist, and a value that cannot \
         be, is an error. Daemons read the file again at SIGHUP.\n.PP\n\\fBnwfilterctl config\\fR shows each value and where it \
         comes from.\n.SH SETTINGS\n",
        env!("CARGO_PKG_VERSION")
    );
    for key in Key::ALL {
        let value = match key.kind() {
            Kind::Directory => "\"/DIRECTORY\"".to_owned(),
            Kind::Word(words) => {
                words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ")
            }
            Kind::Switch => "true or false".to_owned(),
            Kind::Seconds => "SECONDS".to_owned(),
            Kind::Group => "NUMBER".to_owned(),
            Kind::Addresses => "[\"ADDRESS\", ...]".to_owned(),
            Kind::Text => "\"TEXT\"".to_owned(),
        };
        let default = key.default().map(|default| format!(" Without it: {default}."));
        let default = default.unwrap_or_default();
        let about = format!("{}. Variable: {}.{default}", key.about(), key.variable());
        let _ =
            writeln!(text, ".TP\n\\fB{}\\fR = {}\n{}", escaped(key.name()), escaped(&value), escaped(&about));
    }
    text + ".SH EXAMPLES\n.nf\nbackend = \"auto\"\nguard = \"vnet\"\nmetrics = \"unix:/run/nwfilter/metrics\"\n.fi\n.SH SEE ALSO\n\
            \\fBnwfilterctl\\fR(8), \\fBnwfilterctl\\-config\\fR(8)\n"
}
