//! Packages are right, and installing, upgrading, removing and purging them leaves what it should.

use std::sync::OnceLock;

use nwfilter_testlab::{Need, skip_unless};

use super::*;
use crate::vm::Image;

const CHROOT: &str = include_str!("chroot.sh");
const ADOPTION: &str = include_str!("adoption.sh");
const DIVERT: &str = include_str!("divert.sh");
const RPM_LIFECYCLE: &str = include_str!("rpm.sh");
const LIFECYCLE: &str = include_str!("lifecycle.sh");

/// The programs, compiled once for all tests.
fn built() -> &'static Build {
    static BUILT: OnceLock<Build> = OnceLock::new();
    BUILT.get_or_init(|| build(Profile::Dev).unwrap_or_else(|error| panic!("{error:#}")))
}

/// The Debian packages, made once for all tests.
fn debs() -> &'static [PathBuf] {
    static DEBS: OnceLock<Vec<PathBuf>> = OnceLock::new();
    DEBS.get_or_init(|| {
        let made = make(Kind::Deb, &target_directory().join("test-deb"), built(), Profile::Dev);
        made.unwrap_or_else(|error| panic!("{error:#}"))
    })
}

/// Runs a script as root of a copy of a system, beside the packages; what it printed.
fn run_in(system: &Path, script: &str, job: &Path) -> Result<String> {
    fs::write(job.join("run"), script)?;
    let place = tempfile::tempdir()?;
    let mut command = Command::new("timeout");
    command.args([
        "300",
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        CHROOT,
        "chroot.sh",
    ]);
    succeed(command.arg(system).arg(place.path()).arg(job))
}

/// The same packages with the next version.
fn newer(packages: &[PathBuf], directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    for package in packages {
        let tree = tempfile::tempdir()?;
        succeed(Command::new("dpkg-deb").arg("--raw-extract").arg(package).arg(tree.path()))?;
        let control = tree.path().join("DEBIAN/control");
        let fields = fs::read_to_string(&control)?;
        let (this, next) = (format!("{}-1", deb::VERSION), format!("{}-2", deb::VERSION));
        fs::write(&control, fields.replace(&this, &next))?;
        succeed(Command::new("dpkg-deb").args(["-Zgzip", "-z1", "--build"]).arg(tree.path()).arg(directory))?;
    }
    Ok(())
}

#[test]
fn packages_come_upgrade_and_go_on_a_fresh_debian_and_leave_nothing() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("unshare"), Need::Tool("dpkg-shlibdeps"));
    let image = Image::ensure()?;
    let job = tempfile::tempdir()?;
    for package in debs() {
        fs::copy(package, job.path().join(package.file_name().unwrap_or_default()))?;
    }
    newer(debs(), &job.path().join("new"))?;
    let said = run_in(&image.root(), LIFECYCLE, job.path())?;
    assert!(said.ends_with("-- passed\n"), "{said}");
    Ok(())
}

/// In a copy of this machine, which has libvirt and QEMU.
#[test]
fn a_host_with_libvirt_adopts_the_module_and_gives_it_up_with_its_guest_running() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("unshare"), Need::Libvirtd, Need::Qemu, Need::Tool("dpkg-shlibdeps"));
    let job = tempfile::tempdir()?;
    for package in debs() {
        fs::copy(package, job.path().join(package.file_name().unwrap_or_default()))?;
    }
    let said = run_in(Path::new("/"), ADOPTION, job.path())?;
    assert!(said.ends_with("-- passed\n"), "{said}");
    Ok(())
}

#[test]
fn the_rpm_package_keeps_libvirts_module_across_upgrades_and_gives_it_back() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("unshare"));
    let job = tempfile::tempdir()?;
    fs::copy(workspace().join("dist/rpm/divert-module"), job.path().join("divert-module"))?;
    let said = run_in(Path::new("/"), DIVERT, job.path())?;
    assert!(said.ends_with("-- passed\n"), "{said}");
    Ok(())
}

#[test]
fn rpm_installs_upgrades_and_removes_the_packages_with_their_scripts() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("unshare"), Need::Tool("rpmbuild"));
    let job = tempfile::tempdir()?;
    for (directory, release) in [(job.path().to_owned(), "1"), (job.path().join("new"), "2")] {
        make_rpms(&directory, release)?;
    }
    let said = run_in(Path::new("/"), RPM_LIFECYCLE, job.path())?;
    assert!(said.ends_with("-- passed\n"), "{said}");
    Ok(())
}

/// The RPM packages with another release.
fn make_rpms(directory: &Path, release: &str) -> Result<()> {
    fs::create_dir_all(directory)?;
    for package in &contents::PACKAGES {
        let root = tempfile::tempdir()?;
        stage::stage(package, &Layout::fedora(), built(), root.path())?;
        rpm::build_release(package, root.path(), directory, Profile::Dev, release)?;
    }
    Ok(())
}

#[test]
fn lintian_finds_no_error() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("dpkg-shlibdeps"), Need::Tool("lintian"));
    let said = succeed(Command::new("lintian").args(["--allow-root", "--fail-on", "error"]).args(debs()))?;
    assert!(!said.lines().any(|line| line.starts_with("E:")), "{said}");
    Ok(())
}

#[test]
fn both_kinds_of_packages_have_the_same_files() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("dpkg-shlibdeps"), Need::Tool("rpmbuild"));
    let directory = tempfile::tempdir()?;
    let names = |files: String| -> Vec<String> {
        let shared = ["/doc/", "/licenses/", "libvirt_driver_nwfilter.so", "divert-module"];
        let files = files.lines().filter(|file| !file.ends_with('/'));
        let files = files.filter(|file| !shared.iter().any(|part| file.contains(part)));
        let mut files: Vec<_> = files.map(|file| file.trim_start_matches('.').to_owned()).collect();
        files.sort();
        files
    };
    let rpms = make(Kind::Rpm, directory.path(), built(), Profile::Dev)?;
    for (deb, rpm) in debs().iter().zip(&rpms) {
        let tar = "dpkg-deb --fsys-tarfile \"$0\" | tar --list";
        let deb = succeed(Command::new("sh").args(["-c", tar]).arg(deb))?;
        let format = ["--query", "--queryformat", "[%{FILEMODES:perms} %{FILENAMES}\n]", "--package"];
        let rpm = succeed(Command::new("rpm").args(format).arg(rpm))?;
        let rpm = rpm.lines().filter(|line| !line.starts_with('d'));
        let rpm: Vec<_> = rpm.filter_map(|line| Some(line.split_once(' ')?.1)).collect();
        let rpm = rpm.join("\n").replace("site-functions", "vendor-completions");
        assert_eq!(names(deb), names(rpm));
    }
    Ok(())
}
