//! An RPM package of staged files.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::package::contents::Package;
use crate::package::deb::VERSION;
use crate::package::stage::files;
use crate::package::{Profile, succeed, workspace};

const HOMEPAGE: &str = env!("CARGO_PKG_REPOSITORY");

/// Builds it in a directory, of the files below `root`; where it is.
pub(super) fn build(package: &Package, root: &Path, directory: &Path, profile: Profile) -> Result<PathBuf> {
    build_release(package, root, directory, profile, "1")
}

/// The same with the number of a release.
pub(super) fn build_release(
    package: &Package,
    root: &Path,
    directory: &Path,
    profile: Profile,
    release: &str,
) -> Result<PathBuf> {
    let licence = root.join("usr/share/licenses").join(package.name).join("LICENSE");
    licence.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::copy(workspace().join("LICENSE"), licence)?;
    let place = tempfile::tempdir()?;
    let spec = place.path().join("package.spec");
    fs::write(&spec, text(package, root, profile, release)?)?;
    let mut tool = Command::new("rpmbuild");
    tool.arg("-bb").arg("--define").arg(format!("_topdir {}", place.path().display()));
    tool.arg("--define").arg(format!("staged {}", root.display())).arg(&spec);
    succeed(&mut tool)?;
    let built = files(&place.path().join("RPMS"))?;
    let built = built.first().context("rpmbuild made no package")?;
    let file = directory.join(built.file_name().context("a package without name")?);
    fs::copy(place.path().join("RPMS").join(built), &file)?;
    Ok(file)
}

fn text(package: &Package, root: &Path, profile: Profile, release: &str) -> Result<String> {
    let version = format!("{VERSION}-{release}");
    let compression = if profile == Profile::Release { "w6.xzdio" } else { "w0.gzdio" };
    let mut text = format!(
        "%global _build_id_links none\n%global debug_package %{{nil}}\n%global __os_install_post %{{nil}}\n\
         %global _binary_payload {compression}\n\
         Name: {}\nVersion: {VERSION}\nRelease: {release}\nSummary: {}\nLicense: MIT\nURL: {HOMEPAGE}\n",
        package.name, package.summary
    );
    let relations = [
        ("Requires", package.rpm.requires),
        ("Recommends", package.rpm.recommends),
        ("Conflicts", package.rpm.conflicts),
    ];
    for (field, names) in relations {
        for name in names {
            let _ = writeln!(text, "{field}: {}", name.replace("${version}", &version));
        }
    }
    let _ = writeln!(text, "\n%description\n{}\n", package.description);
    text +=
        "%install\nmkdir -p %{buildroot}\ncp -a %{staged}/. %{buildroot}/\n\n%files\n%defattr(-,root,root)\n";
    for directory in own_directories(root)? {
        let _ = writeln!(text, "%dir /{}", directory.display());
    }
    for file in files(root)? {
        let is_setting = file.starts_with("etc") && !root.join(&file).is_symlink();
        let kind = match () {
            () if is_setting => "%config(noreplace) ",
            () if file.starts_with("usr/share/doc") => "%doc ",
            () if file.starts_with("usr/share/licenses") => "%license ",
            () => "",
        };
        let _ = writeln!(text, "{kind}/{}", file.display());
    }
    if let Some(unit) = package.service {
        // None is started: it would close or filter ports of guests that run.
        let _ = writeln!(
            text,
            "\n%post\n[ ! -d /run/systemd/system ] || systemctl daemon-reload >/dev/null 2>&1 || :\n\
             \n%preun\nif [ \"$1\" = 0 ] && [ -d /run/systemd/system ]; then systemctl disable --now {unit} >/dev/null 2>&1 || :; fi\n\
             \n%postun\nif [ \"$1\" -ge 1 ] && [ -d /run/systemd/system ]; then systemctl try-restart {unit} >/dev/null 2>&1 || :; fi"
        );
    }
    let _ = writeln!(text, "\n{}", package.rpm_scripts);
    Ok(text)
}

/// The directories that are only these packages', which go with their last file: those below one that is named after them.
fn own_directories(root: &Path) -> Result<BTreeSet<PathBuf>> {
    let files = files(root)?;
    let directories = files.iter().flat_map(|file| file.ancestors().skip(1));
    let is_own = |directory: &&Path| {
        directory.components().any(|part| {
            let name = part.as_os_str().to_string_lossy();
            name.starts_with("nwfilter") || name.starts_with("libvirt-driver-nwfilter")
        })
    };
    Ok(directories.filter(is_own).map(Path::to_owned).collect())
}
