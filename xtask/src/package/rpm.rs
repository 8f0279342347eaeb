//! An RPM package of staged files.

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
    let licence = root.join("usr/share/licenses").join(package.name).join("LICENSE");
    licence.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::copy(workspace().join("LICENSE"), licence)?;
    let place = tempfile::tempdir()?;
    let spec = place.path().join("package.spec");
    fs::write(&spec, text(package, root, profile)?)?;
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

fn text(package: &Package, root: &Path, profile: Profile) -> Result<String> {
    let version = format!("{VERSION}-1");
    let compression = if profile == Profile::Release { "w6.xzdio" } else { "w0.gzdio" };
    let mut text = format!(
        "%global _build_id_links none\n%global debug_package %{{nil}}\n%global __os_install_post %{{nil}}\n\
         %global _binary_payload {compression}\n\
         Name: {}\nVersion: {VERSION}\nRelease: 1\nSummary: {}\nLicense: MIT\nURL: {HOMEPAGE}\n",
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
