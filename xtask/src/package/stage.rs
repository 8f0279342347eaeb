//! The files of a package, as they are on a host, below a directory.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::package::contents::{Item, Package};
use crate::package::succeed;

/// Where libvirt's module of the name is, below its driver directory.
pub(super) const MODULE: &str = "libvirt_driver_nwfilter.so";

/// What was compiled.
#[derive(Debug)]
pub(super) struct Build {
    pub(super) programs: PathBuf,
    pub(super) manuals: TempDir,
    pub(super) workspace: PathBuf,
}

/// Where a distribution has its files, relative to the root.
#[derive(Debug)]
pub(super) struct Layout {
    /// The module of this package.
    pub(super) module: String,
    pub(super) helpers: &'static str,
    pub(super) zsh: &'static str,
    pub(super) is_rpm: bool,
}

impl Layout {
    pub(super) fn debian() -> Result<Self> {
        let multiarch = succeed(Command::new("dpkg-architecture").arg("--query=DEB_HOST_MULTIARCH"))?;
        Ok(Self {
            module: format!("usr/lib/{}/libvirt/connection-driver/{MODULE}", multiarch.trim()),
            helpers: "usr/libexec/nwfilter",
            zsh: "usr/share/zsh/vendor-completions",
            is_rpm: false,
        })
    }

    /// RPM has no diversions: scripts link to the module, which stands beside.
    pub(super) fn fedora() -> Self {
        Self {
            module: format!("usr/lib64/nwfilter/{MODULE}"),
            helpers: "usr/libexec/nwfilter",
            zsh: "usr/share/zsh/site-functions",
            is_rpm: true,
        }
    }
}

/// Puts the files of a package below `root`.
pub(super) fn stage(package: &Package, layout: &Layout, build: &Build, root: &Path) -> Result<()> {
    let put = |from: &Path, to: &str, mode: u32| -> Result<PathBuf> {
        let to = root.join(to);
        let copy = || {
            to.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::copy(from, &to)?;
            fs::set_permissions(&to, Permissions::from_mode(mode))
        };
        copy().with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(to)
    };
    let program = |name: &str, to: &str, mode: u32| -> Result<()> {
        strip(&put(&build.programs.join(name), to, mode)?)
    };
    let manuals = build.manuals.path();
    let page = |name: &str| -> Result<()> {
        let section = name.rsplit('.').next().unwrap_or_default();
        let page =
            put(&manuals.join("man").join(name), &format!("usr/share/man/man{section}/{name}"), 0o644)?;
        compress(&page)
    };
    for item in package.files {
        match *item {
            Item::Program(name) => program(name, &format!("usr/bin/{name}"), 0o755)?,
            Item::Helper { built, name } => program(built, &format!("{}/{name}", layout.helpers), 0o755)?,
            Item::Module => program("libvirt_driver_nwfilter.so", &layout.module, 0o644)?,
            Item::Unit(name) => {
                let unit = build.workspace.join("dist").join(name);
                put(&unit, &format!("usr/lib/systemd/system/{name}"), 0o644)?;
            }
            Item::Setting { from, to } => {
                put(&build.workspace.join("dist").join(from), to, 0o644)?;
            }
            Item::Manuals => {
                for entry in fs::read_dir(manuals.join("man"))? {
                    let name = entry?.file_name();
                    let name = name.to_string_lossy();
                    if !name.starts_with("nwfilterctl-listen.") {
                        page(&name)?;
                    }
                }
                let completions = manuals.join("completions");
                let bash = "usr/share/bash-completion/completions/nwfilterctl";
                put(&completions.join("bash/nwfilterctl"), bash, 0o644)?;
                put(&completions.join("zsh/_nwfilterctl"), &format!("{}/_nwfilterctl", layout.zsh), 0o644)?;
                let fish = "usr/share/fish/vendor_completions.d/nwfilterctl.fish";
                put(&completions.join("fish/nwfilterctl.fish"), fish, 0o644)?;
            }
            Item::Page(name) => page(name)?,
            Item::Documents => {
                let docs = format!("usr/share/doc/{}", package.name);
                put(&build.workspace.join("README.md"), &format!("{docs}/README.md"), 0o644)?;
                put(&build.workspace.join("dist/grafana.json"), &format!("{docs}/grafana.json"), 0o644)?;
                for entry in fs::read_dir(build.workspace.join("docs"))? {
                    let path = entry?.path();
                    if path.extension().is_some_and(|extension| extension == "md") {
                        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                        put(&path, &format!("{docs}/docs/{name}"), 0o644)?;
                    }
                }
            }
            Item::RpmHelper(name) if layout.is_rpm => {
                let helper = build.workspace.join("dist/rpm").join(name);
                put(&helper, &format!("{}/{name}", layout.helpers), 0o755)?;
            }
            Item::RpmHelper(_) => {}
            Item::Hook(link) => {
                let link = root.join(link);
                link.parent().map_or(Ok(()), fs::create_dir_all)?;
                symlink(Path::new("/").join(layout.helpers).join("nwfilter-hook"), link)?;
            }
        }
    }
    Ok(())
}

/// Takes out of a program what only debuggers need.
fn strip(program: &Path) -> Result<()> {
    let arguments = ["--strip-unneeded", "--remove-section=.comment", "--remove-section=.note"];
    succeed(Command::new("strip").args(arguments).arg(program)).map(drop)
}

/// Compresses a file as Debian wants it: as small as it gets, without name and time.
pub(super) fn compress(file: &Path) -> Result<()> {
    succeed(Command::new("gzip").args(["-9", "--no-name", "--force"]).arg(file)).map(drop)
}

/// The size in KiB of what is staged.
pub(super) fn size(root: &Path) -> Result<u64> {
    let text =
        succeed(Command::new("du").args(["--summarize", "--apparent-size", "--block-size=1024"]).arg(root))?;
    let number = text.split_whitespace().next().and_then(|number| number.parse().ok());
    ensure!(number.is_some(), "du says '{text}'");
    Ok(number.unwrap_or_default())
}

/// The files below a directory, each with its path from there, sorted.
pub(super) fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => directories.push(entry.path()),
                false => found.push(entry.path().strip_prefix(root)?.to_owned()),
            }
        }
    }
    found.sort();
    Ok(found)
}
