//! The lock of a state directory, by which processes take turns.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};

use crate::Error;
use crate::files::make_directory;

/// How long to wait before the holder is logged.
const SILENCE: Duration = Duration::from_secs(1);

/// Locks the directory until the returned value is dropped. Waits for other processes, and logs the holder after a second;
/// `patience` limits the wait.
pub(crate) fn lock(directory: &Path, patience: Option<Duration>) -> Result<Flock<File>, Error> {
    make_directory(directory)?;
    let path = directory.join(".lock");
    let failed = |source| Error::Store { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(failed(errno.into())),
    };
    let locked = lock_in_thread(file).map_err(failed)?;
    let silence = patience.map_or(SILENCE, |patience| patience.min(SILENCE));
    if let Ok(lock) = locked.recv_timeout(silence) {
        return lock.map_err(failed);
    }
    let rest = patience.map(|patience| patience - silence);
    if rest != Some(Duration::ZERO) {
        log::warn!("waiting for {}, which {} holds", path.display(), holder(&path));
    }
    let lock = match rest {
        Some(rest) => locked.recv_timeout(rest).ok(),
        None => locked.recv().ok(),
    };
    match lock {
        Some(lock) => lock.map_err(failed),
        None => {
            let holder = holder(&path);
            Err(Error::Locked { path, holder, patience: patience.unwrap_or_default() })
        }
    }
}

/// Waits for the lock in a thread, because flock(2) has no timeout. If the caller has given up, the thread releases the lock
/// when it gets it.
fn lock_in_thread(mut file: File) -> io::Result<Receiver<io::Result<Flock<File>>>> {
    let (sender, locked) = channel();
    let wait = move || {
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(lock) => break Ok(lock),
                Err((same, Errno::EINTR)) => file = same,
                Err((_, errno)) => break Err(errno.into()),
            }
        };
        let _ = sender.send(lock);
    };
    std::thread::Builder::new().name("nwfilter-lock".into()).spawn(wait)?;
    Ok(locked)
}

/// The holder of a lock, if proc_locks(5) shows it.
fn holder(path: &Path) -> String {
    let find = || {
        let file = fs::metadata(path).ok()?;
        let id = format!("{:02x}:{:02x}:{}", major(file.dev()), minor(file.dev()), file.ino());
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let fields = locks.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let process = fields.into_iter().find_map(|fields| match fields[..] {
            [_, "FLOCK", _, _, process, file, ..] if file == id => Some(process.to_owned()),
            _ => None,
        })?;
        let name = fs::read_to_string(format!("/proc/{process}/comm")).ok()?;
        Some(format!("{} (process {process})", name.trim_end()))
    };
    find().unwrap_or_else(|| "another process".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_the_lock_that_times_out_names_the_holder_and_does_not_block_others() {
        let directory = tempfile::tempdir().unwrap();
        let held = lock(directory.path(), None).unwrap();
        let refused = lock(directory.path(), Some(Duration::from_millis(50))).unwrap_err();
        let own_name = fs::read_to_string("/proc/self/comm").unwrap();
        let expected = format!("{} (process {})", own_name.trim_end(), std::process::id());
        assert!(matches!(&refused, Error::Locked { holder, .. } if *holder == expected), "{refused}");
        assert!(lock(directory.path(), Some(Duration::ZERO)).is_err());
        drop(held);
        drop(lock(directory.path(), Some(Duration::from_secs(60))).unwrap());
    }
}
