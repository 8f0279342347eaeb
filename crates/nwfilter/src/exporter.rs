//! Serves a daemon's metrics by HTTP, on a TCP address or a Unix socket.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Driver, OPENMETRICS, with_causes};

/// The prefix of a Unix socket's address.
const UNIX: &str = "unix:";
/// How long a client may take for its request or to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest request in bytes.
const MAX_REQUEST: usize = 16 << 10;
/// The pause after a connection could not be accepted, for example because of too many open files.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts a thread that answers every HTTP request at `HOST:PORT` or `unix:PATH` with [`Driver::openmetrics`], until the driver
/// is dropped. Creates the directory of a socket. Fails if another program serves there.
pub fn serve_metrics(address: &str, driver: &Arc<Driver>) -> io::Result<()> {
    let (server, driver) = (thread::Builder::new().name("metrics".into()), Arc::downgrade(driver));
    match address.strip_prefix(UNIX) {
        Some(path) => {
            let listener = listen_at(Path::new(path))?;
            server.spawn(move || {
                listener.incoming().for_each(|client| answer(client.and_then(patient_unix), &driver));
            })
        }
        None => {
            let listener = TcpListener::bind(address)?;
            server.spawn(move || {
                listener.incoming().for_each(|client| answer(client.and_then(patient_tcp), &driver));
            })
        }
    }
    .map(drop)
}

/// A socket in the place of one that a killed process left.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        if UnixStream::connect(path).is_ok() {
            return Err(ErrorKind::AddrInUse.into());
        }
        fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

fn patient_unix(client: UnixStream) -> io::Result<UnixStream> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    Ok(client)
}

fn patient_tcp(client: TcpStream) -> io::Result<TcpStream> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    Ok(client)
}

/// Answers one client.
fn answer(client: io::Result<impl Read + Write>, driver: &Weak<Driver>) {
    let answered = match client {
        Ok(client) => answer_request(client, driver),
        Err(error) => {
            thread::sleep(PAUSE);
            Err(error)
        }
    };
    if let Err(error) = answered {
        log::debug!("a client of the metrics: {error}");
    }
}

fn answer_request(mut client: impl Read + Write, driver: &Weak<Driver>) -> io::Result<()> {
    read_request(&mut client)?;
    let Some(driver) = driver.upgrade() else { return Ok(()) };
    let (status, kind, body) = match driver.openmetrics() {
        Ok(metrics) => ("200 OK", OPENMETRICS, metrics),
        Err(error) => ("500 Internal Server Error", "text/plain", with_causes(&error)),
    };
    drop(driver);
    let length = body.len();
    write!(
        client,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Reads a request up to the end of its headers. Its content is ignored.
fn read_request(client: &mut impl Read) -> io::Result<()> {
    let (begin, mut request, mut buffer) = (Instant::now(), Vec::new(), [0; 1024]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || begin.elapsed() > PATIENCE {
            return Err(ErrorKind::TimedOut.into());
        }
        match client.read(&mut buffer)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(())
}
