//! A Debian package of staged files.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::package::contents::Package;
use crate::package::stage::{Layout, compress, files, size};
use crate::package::{Profile, succeed, workspace};

pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
const MAINTAINER: &str = "The nwfilter developers <nwfilter@users.noreply.github.com>";
const HOMEPAGE: &str = env!("CARGO_PKG_REPOSITORY");

/// What every package with a service does in its scripts, beside what is its own.
const SERVICE: &str = include_str!("../../../dist/deb/service.postrm");
const SERVICE_PRERM: &str = include_str!("../../../dist/deb/service.prerm");
const SERVICE_POSTINST: &str = include_str!("../../../dist/deb/service.postinst");

/// Builds it in a directory, of the files below `root`; where it is.
pub(super) fn build(
    package: &Package,
    root: &Path,
    directory: &Path,
    layout: &Layout,
    profile: Profile,
) -> Result<PathBuf> {
    let architecture = succeed(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.trim();
    documents(package, root)?;
    let control = root.join("DEBIAN");
    let (libraries, size, sums, settings) = (libraries(root)?, size(root)?, sums(root)?, settings(root)?);
    fs::create_dir(&control)?;
    let write = |name: &str, text: &str, mode: u32| -> Result<()> {
        let file = control.join(name);
        fs::write(&file, text)?;
        Ok(fs::set_permissions(file, Permissions::from_mode(mode))?)
    };
    write("control", &fields(package, architecture, &libraries, size), 0o644)?;
    write("md5sums", &sums, 0o644)?;
    if !settings.is_empty() {
        write("conffiles", &settings, 0o644)?;
    }
    for name in ["preinst", "postinst", "prerm", "postrm"] {
        if let Some(script) = script(package, layout, name) {
            write(name, &script, 0o755)?;
        }
    }
    make_directories_readable(root)?;
    let file = directory.join(format!("{}_{VERSION}-1_{architecture}.deb", package.name));
    // What is thrown away after a test need not be small, and lintian wants some compression.
    let (how, level) = if profile == Profile::Release { ("-Zxz", "-z6") } else { ("-Zgzip", "-z1") };
    succeed(
        Command::new("dpkg-deb").args([how, level, "--root-owner-group", "--build"]).arg(root).arg(&file),
    )?;
    Ok(file)
}

fn fields(package: &Package, architecture: &str, libraries: &str, size: u64) -> String {
    let version = format!("{VERSION}-1");
    let list = |names: &[&str]| names.join(", ").replace("${version}", &version);
    let depends = [libraries, &list(package.deb.requires)];
    let depends: Vec<_> = depends.into_iter().filter(|part| !part.is_empty()).collect();
    let mut text = format!(
        "Package: {}\nVersion: {version}\nSection: admin\nPriority: optional\nArchitecture: {architecture}\n\
         Maintainer: {MAINTAINER}\nInstalled-Size: {size}\nHomepage: {HOMEPAGE}\nDepends: {}\n",
        package.name,
        depends.join(", ")
    );
    for (field, names) in [("Recommends", package.deb.recommends), ("Conflicts", package.deb.conflicts)] {
        if !names.is_empty() {
            let _ = writeln!(text, "{field}: {}", list(names));
        }
    }
    let _ = writeln!(text, "Description: {}", package.summary);
    for line in package.description.lines() {
        let _ = writeln!(text, " {}", if line.is_empty() { "." } else { line });
    }
    text
}

/// A script of the package: what is its own, and then what its service needs.
fn script(package: &Package, layout: &Layout, name: &str) -> Option<String> {
    let own = package.deb_scripts.iter().find(|(of, _)| *of == name).map(|(_, text)| *text);
    let shared = match name {
        "postinst" => SERVICE_POSTINST,
        "prerm" => SERVICE_PRERM,
        "postrm" => SERVICE,
        _ => "",
    };
    let shared = package.service.filter(|_| !shared.is_empty()).map(|unit| shared.replace("UNIT", unit));
    if own.is_none() && shared.is_none() {
        return None;
    }
    let text = format!("#!/bin/sh\nset -e\n{}{}", own.unwrap_or_default(), shared.unwrap_or_default());
    Some(text.replace("MODULE", &layout.module))
}

/// The libraries that the programs need, as relations.
fn libraries(root: &Path) -> Result<String> {
    let place = tempfile::tempdir()?;
    fs::create_dir(place.path().join("debian"))?;
    fs::write(
        place.path().join("debian/control"),
        "Source: nwfilter\n\nPackage: nwfilter\nArchitecture: any\n",
    )?;
    let programs: Vec<_> = files(root)?.into_iter().map(|file| root.join(file)).collect();
    let programs = programs.iter().filter(|file| is_elf(file));
    let mut tool = Command::new("dpkg-shlibdeps");
    tool.current_dir(place.path()).args(["-O", "--warnings=0"]).args(programs);
    let said = succeed(&mut tool)?;
    Ok(said.trim().strip_prefix("shlibs:Depends=").unwrap_or_default().to_owned())
}

fn is_elf(file: &Path) -> bool {
    !file.is_symlink() && fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"))
}

fn sums(root: &Path) -> Result<String> {
    let files = files(root)?.into_iter().filter(|file| !file.starts_with("DEBIAN"));
    let files: Vec<_> =
        files.filter(|file| !root.join(file).is_symlink() && !file.starts_with("etc")).collect();
    succeed(Command::new("md5sum").current_dir(root).args(files))
}

fn settings(root: &Path) -> Result<String> {
    let files = files(root)?.into_iter().filter(|file| file.starts_with("etc"));
    let files = files.filter(|file| !root.join(file).is_symlink());
    Ok(files.map(|file| format!("/{}\n", file.display())).collect())
}

/// The licence and the changes, which every package has.
fn documents(package: &Package, root: &Path) -> Result<()> {
    let docs = root.join("usr/share/doc").join(package.name);
    fs::create_dir_all(&docs)?;
    let workspace = workspace();
    let licence = fs::read_to_string(workspace.join("LICENSE")).context("cannot read LICENSE")?;
    let licence: String = licence
        .lines()
        .map(|line| if line.is_empty() { " .\n".to_owned() } else { format!(" {line}\n") })
        .collect();
    let copyright = format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: nwfilter\nSource: {HOMEPAGE}\n\n\
         Files: *\nCopyright: The nwfilter developers\nLicense: Expat\n{licence}"
    );
    fs::write(docs.join("copyright"), copyright)?;
    let changes = docs.join("changelog");
    fs::copy(workspace.join("CHANGELOG.md"), &changes)?;
    compress(&changes)?;
    let date = succeed(
        Command::new("date")
            .args(["--utc", "--rfc-email", "--reference"])
            .arg(workspace.join("CHANGELOG.md")),
    )?;
    let debian = docs.join("changelog.Debian");
    let text = format!(
        "nwfilter ({VERSION}-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {MAINTAINER}  {}\n",
        date.trim()
    );
    fs::write(&debian, text)?;
    compress(&debian)?;
    for file in ["copyright", "changelog.gz", "changelog.Debian.gz"] {
        fs::set_permissions(docs.join(file), Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// Whatever the umask is here.
fn make_directories_readable(root: &Path) -> Result<()> {
    let arguments = ["-type", "d", "-exec", "chmod", "0755", "{}", "+"];
    succeed(Command::new("find").arg(root).args(arguments)).map(drop)
}
