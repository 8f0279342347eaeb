//! libnwfilter installed in a directory of its own, and C programs that are built against it by pkg-config alone.

#![allow(dead_code, clippy::unwrap_used)] // Each test uses a part.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

use tempfile::TempDir;

#[path = "../../../../xtask/src/install_capi.rs"]
mod install_capi;

/// libnwfilter below a DESTDIR, which the tests of a target share, since the static library is large.
pub(crate) struct Installed {
    dest: PathBuf,
    dir: TempDir,
}

impl Installed {
    pub(crate) fn new() -> Self {
        static ONCE: Once = Once::new();
        let dest = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME"));
        ONCE.call_once(|| {
            // A test is in target/PROFILE/deps, and so are the libraries of its crate.
            let built = env::current_exe().unwrap().parent().unwrap().to_owned();
            let place = install_capi::Place {
                destdir: dest.clone(),
                prefix: "/opt/nwfilter".into(),
                libdir: "lib".into(),
            };
            let _ = fs::remove_dir_all(&dest);
            let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
            install_capi::install(&built, sources, env!("CARGO_PKG_VERSION"), &place).unwrap();
        });
        Self { dest, dir: tempfile::tempdir().unwrap() }
    }

    /// A directory that is removed in the end.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn lib(&self) -> PathBuf {
        self.dest.join("opt/nwfilter/lib")
    }

    /// What pkg-config says of it.
    pub(crate) fn pkg_config(&self, arguments: &[&str]) -> Vec<String> {
        let mut pkg_config = Command::new("pkg-config");
        self.describe(&mut pkg_config);
        let output = checked(pkg_config.args(arguments).arg("nwfilter"));
        output.split_whitespace().map(str::to_owned).collect()
    }

    /// Lets a program find the installation by pkg-config, and load its library.
    pub(crate) fn describe(&self, command: &mut Command) {
        command.env("PKG_CONFIG_SYSROOT_DIR", &self.dest);
        command.env("PKG_CONFIG_LIBDIR", self.lib().join("pkgconfig"));
        command.env("LD_LIBRARY_PATH", self.lib());
    }

    /// Compiles a C program of this crate.
    pub(crate) fn compile(&self, source: &str, flags: &[&str]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let program = self.dir().join(source.file_stem().unwrap());
        let mut gcc = Command::new("gcc");
        gcc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", "-pthread"]).args(flags);
        gcc.arg(source).args(self.pkg_config(&["--cflags", "--libs"])).arg("-o").arg(&program);
        checked(&mut gcc);
        program
    }
}

/// Runs a program to its end, and gives what it printed.
pub(crate) fn checked(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}
