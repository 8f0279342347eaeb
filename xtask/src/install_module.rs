//! `install-module` and `uninstall-module`: the driver module in the place of libvirt's, which is kept beside it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

const FILE: &str = "libvirt_driver_nwfilter.so";
/// Where libvirt's own module is while ours is installed.
const KEPT: &str = "libvirt_driver_nwfilter.so.libvirt";

/// The sets beside libvirt's filters, which its own driver does not read.
const SETS: &str = "/etc/libvirt/nwfilter/sets";

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Build the module, keep libvirt's aside, put ours in its place.
    Install,
    /// Put libvirt's back.
    Uninstall,
}

/// Installs or uninstalls the module in libvirt's driver directory, or in `dir`. The daemon takes it at its next start.
pub(crate) fn run(step: Step, dir: Option<PathBuf>) -> Result<ExitCode> {
    let dir = dir.map_or_else(driver_dir, Ok)?;
    match step {
        Step::Install => {
            install(&dir, &build()?)?;
            println!("{} is nwfilter's now; libvirt's is beside it as {KEPT}", dir.join(FILE).display());
        }
        Step::Uninstall => {
            uninstall(&dir)?;
            println!("{} is libvirt's again", dir.join(FILE).display());
            println!(
                "If the daemon is killed instead of stopped, see 'Back to libvirt's driver' in docs/libvirt.md first"
            );
            if fs::read_dir(SETS).is_ok_and(|mut sets| sets.next().is_some()) {
                println!(
                    "libvirt's driver does not know the sets in {SETS}: filters that use one are refused under it"
                );
            }
        }
    }
    println!("It is loaded at the next start of the daemon: systemctl restart libvirtd (or virtnwfilterd)");
    Ok(ExitCode::SUCCESS)
}

/// Builds the module; where it is.
pub(crate) fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["build", "--release", "--package", "nwfilter-module", "--message-format", "json"];
    let output = Command::new(cargo).args(arguments).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the module does not build");
    let text = String::from_utf8(output.stdout)?;
    let mut files = text.split('"').filter(|word| word.ends_with(FILE));
    files.next_back().map(PathBuf::from).context("cargo does not say where the module is")
}

fn install(dir: &Path, module: &Path) -> Result<()> {
    let (target, kept) = (dir.join(FILE), dir.join(KEPT));
    if !kept.exists() {
        ensure!(
            target.exists(),
            "{} has no {FILE}: libvirt's nwfilter driver is not installed",
            dir.display()
        );
        match is_packaged(&target) {
            true => divert(&["--add"], &target, &kept)?,
            false => fs::rename(&target, &kept)?,
        }
    }
    // A daemon that runs has the old file open, so it is replaced and not written to.
    let new = dir.join(format!(".{FILE}.new"));
    fs::copy(module, &new).with_context(|| format!("cannot write {}", new.display()))?;
    fs::set_permissions(&new, Permissions::from_mode(0o644))?;
    Ok(fs::rename(&new, &target)?)
}

fn uninstall(dir: &Path) -> Result<()> {
    let (target, kept) = (dir.join(FILE), dir.join(KEPT));
    ensure!(kept.exists(), "{} has no {KEPT}: the module is not installed", dir.display());
    if !is_packaged(&target) {
        return Ok(fs::rename(&kept, &target)?);
    }
    fs::remove_file(&target)?;
    divert(&["--remove"], &target, &kept)
}

/// Whether a Debian package owns the file, so that an upgrade would write it.
fn is_packaged(file: &Path) -> bool {
    let mut query = Command::new("dpkg-query");
    query.arg("--search").arg(file).stdout(Stdio::null()).stderr(Stdio::null());
    query.status().is_ok_and(|status| status.success())
}

fn divert(step: &[&str], target: &Path, kept: &Path) -> Result<()> {
    let mut divert = Command::new("dpkg-divert");
    divert.args(["--local", "--rename", "--divert"]).arg(kept).args(step).arg(target);
    ensure!(divert.status()?.success(), "dpkg-divert failed");
    Ok(())
}

fn driver_dir() -> Result<PathBuf> {
    let multiarch = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let parents = multiarch.chain(["/usr/lib64".into(), "/usr/lib".into()]);
    let mut dirs = parents.map(|parent: PathBuf| parent.join("libvirt/connection-driver"));
    match dirs.find(|dir| dir.join(FILE).exists() || dir.join(KEPT).exists()) {
        Some(dir) => Ok(dir),
        None => bail!("libvirt's driver modules are not installed; --dir names their directory"),
    }
}

#[cfg(test)]
mod tests {
    use nwfilter_testlab::{Need, skip_unless};

    use super::*;

    /// The package's files and dpkg's own are copies in a mount namespace; the test goes on there.
    #[test]
    fn a_module_that_a_package_owns_is_diverted_and_comes_back() -> Result<()> {
        skip_unless!(Need::Root, Need::Libvirtd, Need::Tool("dpkg-divert"), Need::Tool("unshare"));
        let copies = tempfile::tempdir()?;
        let script = "set -e; mount --make-rprivate /
            for dir in \"$1\" /var/lib/dpkg; do
              copy=$2/$(basename \"$dir\"); cp -a \"$dir\" \"$copy\"; mount --bind \"$copy\" \"$dir\"
            done
            exec \"$0\" --exact install_module::tests::with_copies_of_the_package --ignored --nocapture";
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .arg(std::env::current_exe()?)
            .arg(driver_dir()?)
            .arg(copies.path())
            .output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success() && said.contains("1 passed"), "{said}");
        Ok(())
    }

    #[test]
    #[ignore = "run by the test of diversion"]
    fn with_copies_of_the_package() -> Result<()> {
        let dir = driver_dir()?;
        let target = dir.join(FILE);
        let diversions = || -> Result<String> {
            Ok(String::from_utf8(Command::new("dpkg-divert").arg("--list").output()?.stdout)?)
        };
        let (libvirts, before) = (fs::read(&target)?, diversions()?);
        let module = tempfile::NamedTempFile::new()?;
        for content in ["ours", "newer"] {
            fs::write(module.path(), content)?;
            install(&dir, module.path())?;
            assert_eq!(fs::read_to_string(&target)?, content);
            // What a new version of the package would write.
            let owned = Command::new("dpkg-divert").arg("--truename").arg(&target).output()?;
            assert_eq!(String::from_utf8(owned.stdout)?.trim(), dir.join(KEPT).display().to_string());
        }
        uninstall(&dir)?;
        assert_eq!(fs::read(&target)?, libvirts);
        assert_eq!(diversions()?, before);
        Ok(())
    }

    #[test]
    fn libvirts_module_is_kept_and_comes_back() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let (target, module) = (dir.path().join(FILE), dir.path().join("built"));
        fs::write(&target, "libvirt's")?;
        fs::write(&module, "ours")?;
        install(dir.path(), &module)?;
        assert_eq!(fs::read_to_string(&target)?, "ours");

        fs::write(&module, "newer")?;
        install(dir.path(), &module)?;
        assert_eq!(fs::read_to_string(&target)?, "newer");

        uninstall(dir.path())?;
        assert_eq!(fs::read_to_string(&target)?, "libvirt's");
        assert!(uninstall(dir.path()).is_err());
        Ok(())
    }
}
