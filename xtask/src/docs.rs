//! `cargo xtask docs`: checks the book and every other page, and makes HTML of the book where mdBook is installed.
//!
//! Checked is that the book lists each of its pages once, and that each link of a page leads to a file and a heading that
//! exist. That the commands work is checked by `crates/nwfilterctl/tests/book.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Checks all pages, and builds the book.
pub(crate) fn run() -> Result<ExitCode> {
    let root = root()?;
    let problems = check(&root)?;
    if !problems.is_empty() {
        bail!("the documentation is not as it should be:\n  {}", problems.join("\n  "));
    }
    println!("every page is in the book, and every link leads somewhere");
    match Command::new("mdbook").args(["build", "docs"]).current_dir(&root).status() {
        Ok(status) if status.success() => {
            println!("the book is in {}", root.join("book/index.html").display())
        }
        Ok(status) => bail!("mdbook failed: {status}"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("mdbook, which makes HTML of it, is not installed: cargo install mdbook");
        }
        Err(error) => return Err(error).context("cannot run mdbook"),
    }
    Ok(ExitCode::SUCCESS)
}

fn root() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?)
}

/// What is wrong, sorted by page.
fn check(root: &Path) -> Result<Vec<String>> {
    let docs = root.join("docs");
    let mut files = pages_in(&docs)?;
    for file in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        files.insert(root.join(file));
    }
    for krate in fs::read_dir(root.join("crates"))? {
        files.extend(Some(krate?.path().join("README.md")).filter(|readme| readme.exists()));
    }
    let mut pages = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        pages.insert(file, Page::read(&text));
    }
    let mut problems = missing_pages(&docs, &pages);
    for (file, page) in &pages {
        let shown = file.strip_prefix(root).unwrap_or(file).display();
        let wrong = page.links.iter().filter_map(|link| wrong(file, link, &pages));
        problems.extend(wrong.map(|what| format!("{shown}: {what}")));
    }
    problems.sort();
    Ok(problems)
}

fn pages_in(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut pages = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.insert(path);
        }
    }
    Ok(pages)
}

/// Pages that the book's summary does not list, or lists twice.
fn missing_pages(docs: &Path, pages: &BTreeMap<PathBuf, Page>) -> Vec<String> {
    let summary = docs.join("SUMMARY.md");
    let Some(listed) = pages.get(&summary) else { return vec!["docs/SUMMARY.md is missing".into()] };
    let in_book = pages.keys().filter(|page| page.starts_with(docs) && **page != summary);
    let name =
        |page: &PathBuf| page.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let count = |page: &str| listed.links.iter().filter(|link| *link == page).count();
    let counted = in_book.map(name).map(|page| (count(&page), page)).filter(|(count, _)| *count != 1);
    counted.map(|(count, page)| format!("docs/SUMMARY.md: {page} is listed {count} times")).collect()
}

/// What is wrong with a link of a page.
fn wrong(file: &Path, link: &str, pages: &BTreeMap<PathBuf, Page>) -> Option<String> {
    if ["http:", "https:", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let target = match path {
        "" => file.to_owned(),
        path => match file.parent()?.join(path).canonicalize() {
            Ok(target) => target,
            Err(error) => return Some(format!("link to {link}: {error}")),
        },
    };
    let is_in_book = |file: &Path| file.parent().is_some_and(|directory| directory.ends_with("docs"));
    if is_in_book(file) && pages.contains_key(&target) && !is_in_book(&target) {
        return Some(format!(
            "link to {link}: it is no page of the book, so mdBook makes a link to an HTML file that is not there"
        ));
    }
    let anchor = anchor?;
    let page = pages.get(&target)?;
    (!page.anchors.contains(anchor)).then(|| format!("link to {link}: no heading there has that name"))
}

/// What matters of a page.
struct Page {
    links: Vec<String>,
    /// The names by which its headings can be linked to.
    anchors: BTreeSet<String>,
}

impl Page {
    fn read(text: &str) -> Self {
        let (mut links, mut anchors, mut heading) = (Vec::new(), BTreeSet::new(), None);
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let name = slug(&heading.take().unwrap_or_default());
                    // The second of a name gets a number.
                    let numbered = (1..).map(|number| format!("{name}-{number}"));
                    let free =
                        [name.clone()].into_iter().chain(numbered).find(|name| !anchors.contains(name));
                    anchors.extend(free);
                }
                Event::Text(text) | Event::Code(text) => {
                    heading.iter_mut().for_each(|heading| heading.push_str(&text));
                }
                _ => (),
            }
        }
        Self { links, anchors }
    }
}

/// The name of a heading in links, as GitHub and mdBook make it.
fn slug(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_in_the_book_and_every_link_leads_somewhere() {
        assert_eq!(check(&root().unwrap()).unwrap(), [""; 0]);
    }

    #[test]
    fn a_link_that_leads_nowhere_and_a_page_that_is_not_listed_are_found() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for directory in ["docs", "crates"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        for (file, text) in [
            ("README.md", "[a](docs/a.md#one-two) [b](docs/a.md#three) [c](gone.md)"),
            ("ARCHITECTURE.md", ""),
            ("CHANGELOG.md", ""),
            ("docs/SUMMARY.md", "- [A](a.md)"),
            ("docs/a.md", "# One, `two`\n\n[here](#one-two) [outside](../README.md)"),
            ("docs/b.md", ""),
        ] {
            fs::write(root.join(file), text).unwrap();
        }
        assert_eq!(
            check(&root).unwrap(),
            [
                "README.md: link to docs/a.md#three: no heading there has that name",
                "README.md: link to gone.md: No such file or directory (os error 2)",
                "docs/SUMMARY.md: b.md is listed 0 times",
                "docs/a.md: link to ../README.md: it is no page of the book, so mdBook makes a link to an HTML file that is not there",
            ]
        );
    }

    #[test]
    fn every_task_that_a_page_names_exists() {
        use clap::CommandFactory;
        let cli = crate::Cli::command();
        let root = root().unwrap();
        let mut pages = pages_in(&root.join("docs")).unwrap();
        pages.insert(root.join("README.md"));
        for page in pages {
            let text = fs::read_to_string(&page).unwrap();
            for rest in text.split("cargo xtask ").skip(1) {
                let task: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
                let known = task.is_empty() || cli.get_subcommands().any(|known| known.get_name() == task);
                assert!(known, "{}: cargo xtask {task}", page.display());
            }
        }
    }
}
