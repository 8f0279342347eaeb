//! Owning the table: nobody else can change or flush it then, and who wants to change it asks the owner.
//!
//! The kernel ties an owned table to the netlink socket that claimed it (`flags owner`). With `persist`, since Linux 6.9, it
//! stays in force when the socket is closed, also by a crash, and the next owner claims it; without, it would vanish with its
//! owner and leave every port open, so that on older kernels the table is not owned.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::kernel::{CommitError, Connection, Error, Operation, TableFlags, TableId, Transaction};
use crate::layout;
use crate::relay;

/// The name of the socket in the directory where the owner serves.
const SOCKET: &str = ".nftables-owner";

/// How long nobody is served after that failed, as where the process has no descriptor left.
const REST: Duration = Duration::from_millis(100);

/// How an owned table is held.
pub(crate) const OWNED: TableFlags = TableFlags { dormant: false, owner: true, persist: true };

/// Where the owner of the table serves.
pub(crate) fn socket(directory: &Path) -> PathBuf {
    directory.join(SOCKET)
}

/// Whether the kernel keeps an owned table when its owner is gone.
pub(crate) fn is_possible(connection: &mut Connection) -> Result<bool, Error> {
    let table = TableId::bridge(layout::fixed("nwfilter-probe"));
    let mut transaction = Transaction::new();
    transaction.push(Operation::AddTable { table, flags: OWNED }, ());
    match connection.validate(&transaction) {
        Ok(()) => Ok(true),
        Err(CommitError::Netlink(error)) => Err(error),
        Err(_) => Ok(false),
    }
}

/// Serves those who want to change the table, in a thread, until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    path: PathBuf,
    /// The inode of its socket: a successor may have put its own there.
    inode: u64,
    stop: Arc<EventFd>,
}

impl Server {
    /// Serves in a directory. Each who asks is answered by `answer`, one after the other; others wait in the kernel's queue.
    pub(crate) fn start(
        directory: &Path,
        answer: impl Fn(&UnixStream) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let path = socket(directory);
        // Whoever served before is gone; its socket is not.
        let new = directory.join(format!("{SOCKET}.{}", std::process::id()));
        let _ = fs::remove_file(&new);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let listener = UnixListener::bind(&new)?;
        let prepared = fs::set_permissions(&new, fs::Permissions::from_mode(0o600))
            .and_then(|()| listener.set_nonblocking(true))
            .and_then(|()| fs::rename(&new, &path));
        prepared.inspect_err(|_| drop(fs::remove_file(&new)))?;
        let inode = fs::symlink_metadata(&path)?.ino();
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let server = Self { path, inode, stop: stop.clone() };
        std::thread::Builder::new()
            .name("nwfilter-owner".into())
            .spawn(move || serve(&listener, &stop, answer))?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
        // The thread may wait for whoever drops it, so that nobody waits for the thread.
        if let Err(errno) = self.stop.write(1) {
            log::error!("the thread that serves at {} goes on: {errno}", self.path.display());
        }
    }
}

fn serve(listener: &UnixListener, stop: &EventFd, answer: impl Fn(&UnixStream) -> io::Result<()>) {
    loop {
        let mut ready = [listener.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return log::error!("nobody is served any more who changes the table: {errno}"),
        }
        if ready[1].any().unwrap_or(true) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let answered = stream.set_nonblocking(false).and_then(|()| answer(&stream));
                if let Err(error) = answered {
                    log::warn!("{} was not answered: {error}", of(&stream));
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                log::warn!("somebody who wants to change the table is not heard yet: {error}");
                std::thread::sleep(REST);
            }
        }
    }
}

fn of(stream: &UnixStream) -> String {
    relay::process(stream).map_or_else(|| "somebody".into(), |process| process.to_string())
}
