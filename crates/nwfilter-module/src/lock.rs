//! The lock that prevents two daemons from filtering the ports of one host. It is libvirt's own lock, so it also excludes
//! libvirt's driver in another daemon.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, fcntl};

const DIRECTORY: &str = "/run/libvirt/nwfilter";
const FILE: &str = "driver.pid";

/// The lock file, while this process has the lock.
static HELD: Mutex<Option<File>> = Mutex::new(None);

/// Takes the lock until [`release`] or the end of the process.
pub(crate) fn take() -> Result<(), String> {
    let path = Path::new(DIRECTORY).join(FILE);
    let file = acquire(&path).map_err(|error| {
        let another = [io::ErrorKind::WouldBlock, io::ErrorKind::PermissionDenied].contains(&error.kind());
        let why =
            if another { "another daemon filters the ports of this host" } else { "it cannot be locked" };
        format!("{}: {why}: {error}", path.display())
    })?;
    *held() = Some(file);
    Ok(())
}

/// Releases the lock.
pub(crate) fn release() {
    if let Some(file) = held().take() {
        // The file is removed while the lock is held, so that no process can lock a file that is about to be removed.
        let _ = fs::remove_file(Path::new(DIRECTORY).join(FILE));
        drop(file);
    }
}

fn held() -> MutexGuard<'static, Option<File>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks the first byte of the file, as libvirt does, and writes the process id into it.
fn acquire(path: &Path) -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    loop {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).mode(0o644).open(path)?;
        let first_byte = libc::flock {
            l_type: libc::F_WRLCK as _,
            l_whence: libc::SEEK_SET as _,
            l_start: 0,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_SETLK(&first_byte))?;
        // The previous holder may have removed the file after it was opened here.
        if fs::metadata(path)
            .is_ok_and(|there| Some(there.ino()) == file.metadata().ok().map(|here| here.ino()))
        {
            file.set_len(0)?;
            write!(file, "{}", std::process::id())?;
            return Ok(file);
        }
    }
}
