//! Installs libnwfilter for C: the libraries, the header and the pkg-config file, as `cargo cinstall` does.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The version of the ABI, by which programs load the library.
const MAJOR: &str = "1";
const FULL: &str = "1.0.0";

/// Where libnwfilter goes.
pub(crate) struct Place {
    /// A directory that stands for `/`, as packages are made in one.
    pub(crate) destdir: PathBuf,
    /// The directory on the host, such as `/usr/local`.
    pub(crate) prefix: PathBuf,
    /// The directory of libraries below it, such as `lib/x86_64-linux-gnu`.
    pub(crate) libdir: PathBuf,
}

/// Installs what cargo built in `built`, with the header of the crate at `sources`.
pub(crate) fn install(built: &Path, sources: &Path, version: &str, place: &Place) -> io::Result<()> {
    let Place { destdir, prefix, libdir } = place;
    let root = destdir.join(prefix.strip_prefix("/").unwrap_or(prefix));
    let (lib, include) = (root.join(libdir), root.join("include"));
    fs::create_dir_all(lib.join("pkgconfig"))?;
    fs::create_dir_all(&include)?;
    let shared = format!("libnwfilter.so.{FULL}");
    replace(&built.join("libnwfilter_capi.so"), &lib.join(&shared))?;
    for name in [format!("libnwfilter.so.{MAJOR}"), "libnwfilter.so".to_owned()] {
        let link = lib.join(name);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        symlink(&shared, link)?;
    }
    replace(&built.join("libnwfilter_capi.a"), &lib.join("libnwfilter.a"))?;
    replace(&sources.join("include/nwfilter.h"), &include.join("nwfilter.h"))?;
    let (prefix, libdir) = (prefix.display(), libdir.display());
    let text = format!(
        "prefix={prefix}\n\
         libdir=${{prefix}}/{libdir}\n\
         includedir=${{prefix}}/include\n\
         \n\
         Name: nwfilter\n\
         Description: Filters the traffic of virtual machines by libvirt's nwfilter documents\n\
         Version: {version}\n\
         Libs: -L${{libdir}} -lnwfilter\n\
         Libs.private: -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc\n\
         Cflags: -I${{includedir}}\n"
    );
    fs::write(lib.join("pkgconfig/nwfilter.pc"), text)
}

/// Copies beside the place and moves there, so that a program that uses the old file goes on with it.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new)?;
    fs::rename(new, to)
}
