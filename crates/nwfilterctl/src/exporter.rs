//! Serves a daemon's metrics by HTTP, on a TCP address or a Unix socket.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nwfilter::{Driver, OPENMETRICS, with_causes};

/// What a Unix socket's address begins with.
const UNIX: &str = "unix:";
/// How long a client may take for its request or to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes that a request may have.
const MAX_REQUEST: usize = 16 << 10;
/// The pause after a connection that could not be accepted, as when there are too many open files.
const PAUSE: Duration = Duration::from_secs(1);

/// Answers every request at `HOST:PORT` or `unix:PATH` with the metrics of a driver, in a thread, for as long as there is
/// the driver.
pub fn serve(address: &str, driver: Weak<Driver>) -> Result<()> {
    let context = || format!("cannot serve metrics at {address}");
    let server = thread::Builder::new().name("metrics".into());
    match address.strip_prefix(UNIX) {
        Some(path) => {
            // One that a killed process left.
            if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
                fs::remove_file(path).with_context(context)?;
            }
            let listener = UnixListener::bind(path).with_context(context)?;
            server.spawn(move || {
                listener.incoming().for_each(|client| answer(client.and_then(patient_unix), &driver));
            })
        }
        None => {
            let listener = TcpListener::bind(address).with_context(context)?;
            server.spawn(move || {
                listener.incoming().for_each(|client| answer(client.and_then(patient_tcp), &driver));
            })
        }
    }
    .with_context(context)?;
    Ok(())
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

/// Reads a request to the end of its headers. What it asks for does not matter.
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
