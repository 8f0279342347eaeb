//! The book's commands: what the pages tell a reader to type works, and prints what they show.
//!
//! A page is followed from top to bottom, in a network namespace of its own, with stores of its own. A block
//! `xml,file=NAME` is saved, a block `sh` is run, and of a block `console` the lines after `# ` are run and the others are
//! what they print, where `…` stands for anything. Of other blocks the lines that begin with `nwfilterctl` must be
//! command lines that it understands.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nwfilter_testlab::{Host, Need, skip_unless};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nwfilterctl");

/// A block of a page between two fences.
struct Block {
    line: usize,
    kind: String,
    text: String,
}

/// Something that a reader does.
enum Step {
    Save {
        file: String,
        text: String,
    },
    Run {
        line: usize,
        command: String,
    },
    /// And compare what it prints.
    Show {
        line: usize,
        command: String,
        output: String,
    },
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for (number, line) in page.lines().enumerate() {
        match line.trim_start().strip_prefix("```") {
            Some(_) if inside => inside = false,
            Some(kind) => {
                inside = true;
                blocks.push(Block { line: number + 1, kind: kind.trim().to_owned(), text: String::new() });
            }
            None if inside => {
                let text = &mut blocks.last_mut().unwrap().text;
                writeln!(text, "{line}").unwrap();
            }
            None => (),
        }
    }
    blocks
}

fn steps(page: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for Block { line, kind, text } in blocks(page) {
        if let Some(file) = kind.strip_prefix("xml,file=") {
            steps.push(Step::Save { file: file.to_owned(), text });
        } else if kind == "sh" {
            steps.push(Step::Run { line, command: text });
        } else if kind == "console" {
            for (number, text) in text.lines().enumerate() {
                match (text.strip_prefix("# "), steps.last_mut()) {
                    (Some(command), _) => {
                        let line = line + number + 1;
                        steps.push(Step::Show { line, command: command.to_owned(), output: String::new() });
                    }
                    (None, Some(Step::Show { output, .. })) => writeln!(output, "{text}").unwrap(),
                    (None, _) => panic!("line {line}: a block of kind console begins with a command"),
                }
            }
        }
    }
    steps
}

/// Whether an output fits what a page shows: in a line, `…` stands for anything, and alone for any lines.
fn fits(shown: &[&str], output: &[&str]) -> bool {
    match (shown.split_first(), output.split_first()) {
        (None, None) => true,
        (Some((&"…", rest)), None) => fits(rest, output),
        (Some((&"…", rest)), Some((_, more))) => fits(rest, output) || fits(shown, more),
        (Some((line, rest)), Some((found, more))) => line_fits(line, found) && fits(rest, more),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

fn line_fits(pattern: &str, line: &str) -> bool {
    match pattern.split_once('…') {
        None => pattern == line,
        Some((begin, rest)) => line.strip_prefix(begin).is_some_and(|line| {
            let mut tails = line.char_indices().map(|(at, _)| &line[at..]).chain([""]);
            tails.any(|tail| line_fits(rest, tail))
        }),
    }
}

/// Does what a page says.
fn follow(page: &str) {
    let text = fs::read_to_string(root().join(page)).unwrap();
    let (host, dir) = (Host::new().unwrap(), tempfile::tempdir().unwrap());
    let mut script = "mount -t tmpfs none /run\n".to_owned();
    let steps = steps(&text);
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Save { file, text } => {
                fs::write(dir.path().join(format!("{number}.save")), text).unwrap();
                writeln!(script, "cp {number}.save {file}").unwrap();
            }
            Step::Run { command, .. } | Step::Show { command, .. } => {
                let stop = if matches!(step, Step::Run { .. }) { "set -e\n" } else { "" };
                fs::write(dir.path().join(format!("{number}.sh")), format!("{stop}{command}\n")).unwrap();
                writeln!(script, "sh {number}.sh > {number}.out 2>&1; echo $? > {number}.code").unwrap();
            }
        }
    }
    let path =
        format!("{}:{}", Path::new(PROGRAM).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut command = host.command("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(dir.path()).env("PATH", path);
    command
        .env("NWFILTER_CONFIG_DIR", dir.path().join("etc"))
        .env("NWFILTER_STATE_DIR", dir.path().join("state"));
    command.env_remove("RUST_LOG").env("LC_ALL", "C").stdin(Stdio::null());
    let followed = command.output().unwrap();
    assert!(followed.status.success(), "{page}: {}", String::from_utf8_lossy(&followed.stderr));
    for (number, step) in steps.iter().enumerate() {
        let read = |kind: &str| fs::read_to_string(dir.path().join(format!("{number}.{kind}"))).unwrap();
        match step {
            Step::Save { .. } => (),
            Step::Run { line, command } => {
                assert_eq!(read("code"), "0\n", "{page}:{line}: {command}\n{}", read("out"));
            }
            Step::Show { line, command, output } => {
                let out = read("out");
                let [shown, found] = [output, &out].map(|text| text.lines().collect::<Vec<_>>());
                assert!(fits(&shown, &found), "{page}:{line}: {command}\n{}", read("out"));
            }
        }
    }
}

macro_rules! pages {
    ($($test:ident follows $page:literal $(with $need:expr)?;)*) => {
        $(#[test]
        fn $test() {
            skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"), Need::Tool("ping") $(, $need)?);
            follow($page);
        })*

        /// The pages that a test follows.
        const FOLLOWED: &[&str] = &[$($page),*];
    };
}

pages! {
    the_tutorial_works_as_it_is_written follows "docs/tutorial.md";
    every_recipe_does_what_it_says follows "docs/recipes.md";
    the_advice_for_each_symptom_works follows "docs/troubleshooting.md";
    what_is_said_about_security_is_so follows "docs/security.md";
    moving_between_drivers_works_as_it_is_written follows "docs/migrating.md" with Need::Libvirtd;
}

#[test]
fn a_page_with_blocks_to_run_is_followed_by_a_test() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let is_followed = FOLLOWED.iter().any(|followed| page.ends_with(followed));
        let runs =
            blocks(&text).iter().any(|block| block.kind == "console" || block.kind.starts_with("xml,file="));
        assert!(is_followed || !runs, "{} has blocks that no test runs", page.display());
    }
}

/// The arguments of a command line, as far as a shell would give them to its program.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![String::new()], None);
    for c in line.chars() {
        match (c, quote) {
            (c, Some(end)) if c == end => quote = None,
            (c, Some(_)) => words.last_mut().unwrap().push(c),
            ('\'' | '"', None) => quote = Some(c),
            ('#' | '|' | '>' | '<' | ';' | '&', None) => break,
            (' ', None) => words.push(String::new()),
            (c, None) => words.last_mut().unwrap().push(c),
        }
    }
    words.into_iter().skip(1).filter(|word| !word.is_empty()).collect()
}

/// The README and the pages of the book.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> = docs.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    pages.push(root().join("README.md"));
    pages.sort();
    pages
}

#[test]
fn every_command_line_in_readme_and_book_is_understood() {
    let mut checked = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for block in blocks(&text) {
            for (number, line) in block.text.lines().enumerate() {
                let line = line.trim_start_matches(['#', '$', ' ']);
                // What stands for something else, as in a synopsis, is no command line.
                if !line.starts_with("nwfilterctl ") || line.contains(['[', '…']) || line.contains("VERB") {
                    continue;
                }
                let words = words(line);
                let output = Command::new(PROGRAM).args(&words).arg("--help").output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr);
                let place = format!("{}:{}", page.display(), block.line + number + 1);
                assert!(output.status.success(), "{place}: {line}\n{said}");
                checked += 1;
            }
        }
    }
    assert!(checked > 25, "{checked} command lines");
}

#[test]
fn an_ellipsis_stands_for_any_text() {
    assert!(fits(&["a … c"], &["a b c"]) && fits(&["… 1 received, …"], &["2 sent, 1 received, 0% loss"]));
    assert!(fits(&[], &[]) && fits(&["a", "…"], &["a"]) && fits(&["…", "c"], &["a", "b", "c"]));
    assert!(!fits(&["a"], &["a", "b"]) && !fits(&["a … d"], &["a b c"]) && !fits(&["b …"], &["a b"]));
    assert!(!fits(&[], &["x"]) && !fits(&["… b"], &["a", "b"]));
}
