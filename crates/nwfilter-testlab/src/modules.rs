//! libvirt's driver modules, and directories of them in which the nwfilter driver is another, or none.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::LibvirtdOptions;

/// The file name of the nwfilter driver.
const NWFILTER: &str = "libvirt_driver_nwfilter.so";

/// A directory of the installed driver modules.
#[derive(Debug)]
pub struct DriverDir(TempDir);

impl DriverDir {
    /// All modules but the nwfilter driver.
    pub fn without_nwfilter() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        for entry in fs::read_dir(installed()?)? {
            let path = entry?.path();
            if let Some(name) = path.file_name().filter(|name| *name != NWFILTER) {
                symlink(&path, dir.path().join(name))?;
            }
        }
        Ok(Self(dir))
    }

    /// Puts a nwfilter driver in the place of the one there was, for the next start of a daemon.
    pub fn install(&self, module: &Path) -> Result<()> {
        let file = self.0.path().join(NWFILTER);
        let _ = fs::remove_file(&file);
        Ok(symlink(module, file)?)
    }

    /// Puts libvirt's own nwfilter driver there.
    pub fn install_libvirts(&self) -> Result<()> {
        self.install(&installed()?.join(NWFILTER))
    }

    /// For a libvirtd that runs QEMU guests with these modules, for as long as the directory is there.
    pub fn options(&self) -> LibvirtdOptions {
        LibvirtdOptions {
            driver_dir: Some(self.0.path().to_owned()),
            qemu_conf: true,
            ..LibvirtdOptions::default()
        }
    }
}

/// Where libvirt is installed, its modules are below the directory of libraries, or of those of one architecture.
fn installed() -> Result<PathBuf> {
    let below = |dir: &str| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        std::iter::once(PathBuf::from(dir)).chain(entries.map(|entry| entry.path())).collect::<Vec<_>>()
    };
    let dirs = ["/usr/lib", "/usr/lib64"].into_iter().flat_map(below);
    let mut modules = dirs.map(|dir| dir.join("libvirt/connection-driver"));
    modules.find(|dir| dir.join(NWFILTER).is_file()).context("libvirt's driver modules are not installed")
}
