//! Checks which nwfilter driver libvirt loads.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Finding, Level, Patient};

const MODULE: &str = "libvirt_driver_nwfilter.so";
/// The name of libvirt's own module while ours replaces it.
const KEPT: &str = "libvirt_driver_nwfilter.so.libvirt";
const CHECK: &str = "module";

pub(super) fn check(patient: &Patient<'_>) -> Option<Finding> {
    let dir = driver_dir()?;
    Some(judge(&dir, is_libvirts(&patient.options.state_dir)))
}

fn is_libvirts(directory: &Path) -> bool {
    ["/run/libvirt", "/var/run/libvirt"].iter().any(|libvirts| directory.starts_with(libvirts))
}

/// The directory of libvirt's driver modules.
fn driver_dir() -> Option<PathBuf> {
    let multiarch = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let parents = multiarch.chain(["/usr/lib64".into(), "/usr/lib".into()]);
    parents.map(|parent: PathBuf| parent.join("libvirt/connection-driver")).find(|dir| dir.is_dir())
}

fn judge(dir: &Path, works_on_libvirts_stores: bool) -> Finding {
    let module = dir.join(MODULE);
    let shown = module.display();
    match (module.exists(), dir.join(KEPT).exists()) {
        (true, true) => {
            Finding::new(Level::Good, CHECK, format!("libvirt loads nwfilter's module ({shown})"))
        }
        (true, false) => {
            let what = format!("libvirt loads its own nwfilter driver ({shown})");
            // Two drivers on the same ports would each take the other's rules for foreign ones.
            let level = if works_on_libvirts_stores { Level::Warning } else { Level::Note };
            Finding::new(level, CHECK, what)
                .help("install nwfilter's module in its place if this driver is to filter libvirt's guests")
        }
        (false, true) => Finding::new(
            Level::Problem,
            CHECK,
            format!("{shown} is missing, so domains with filters do not start"),
        )
        .help(format!("install nwfilter's module again, or move {KEPT} back to {MODULE}")),
        (false, false) => Finding::new(
            Level::Note,
            CHECK,
            "libvirt is installed without an nwfilter driver: a domain with <filterref> does not start",
        )
        .help("install nwfilter's module, or use the metadata that 'nwfilterctl listen' and the hook read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_that_libvirt_loads_is_told_from_the_one_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let level = |own| judge(dir.path(), own).level;
        assert_eq!(level(false), Level::Note);
        fs::write(dir.path().join(KEPT), "").unwrap();
        assert_eq!(level(false), Level::Problem);
        fs::write(dir.path().join(MODULE), "").unwrap();
        assert_eq!(level(true), Level::Good);
        fs::remove_file(dir.path().join(KEPT)).unwrap();
        assert_eq!((level(false), level(true)), (Level::Note, Level::Warning));
    }
}
