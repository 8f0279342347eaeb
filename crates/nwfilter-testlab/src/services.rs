//! Servers that run in a namespace, and the clients that talk to them.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::netns::{Netns, Process};

/// How often a service looks whether it shall end.
const TICK: Duration = Duration::from_millis(20);

/// A server of this process that listens in a namespace until it is dropped.
#[derive(Debug)]
pub struct Service {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    _netns: Netns,
}

impl Service {
    fn start(netns: &Netns, serve: impl FnOnce(&Stop) + Send + 'static) -> Self {
        let stop = Stop::default();
        let stopped = stop.clone();
        let thread = Some(thread::spawn(move || serve(&stopped)));
        Self { stop, thread, _netns: netns.clone() }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[derive(Clone, Debug, Default)]
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Netns {
    /// Serves the files of a directory by FTP to anonymous users, with data from port 20 where
    /// the client asks for an active transfer. The directory is made readable for all.
    pub fn vsftpd(&self, dir: &Path) -> Result<Process> {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        let files = tempfile::tempdir()?;
        let (config, empty) = (files.path().join("vsftpd.conf"), files.path().join("empty"));
        fs::create_dir(&empty)?;
        let (dir, empty) = (dir.display(), empty.display());
        let text = format!(
            "listen=YES\nanonymous_enable=YES\nanon_root={dir}\nno_anon_password=YES\n\
             connect_from_port_20=YES\nport_enable=YES\nsecure_chroot_dir={empty}\n\
             background=NO\nseccomp_sandbox=NO\nisolate=NO\nisolate_network=NO\n"
        );
        fs::write(&config, text)?;
        let mut process = self.spawn(&["vsftpd", config.to_str().context("path is no text")?])?;
        process.keep(files);
        self.wait_listening(process, 21)
    }

    /// Leases the addresses 10.0.0.50 to 10.0.0.60, for two minutes; keeps its files in `dir`.
    pub fn dhcp_server(&self, dir: &Path) -> Result<Process> {
        let leases = format!("--dhcp-leasefile={}", dir.join("leases").display());
        let pid = format!("--pid-file={}", dir.join("pid").display());
        self.spawn(&[
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--port=0",
            "--interface=eth0",
            "--dhcp-range=10.0.0.50,10.0.0.60,255.255.255.0,120",
            "--dhcp-authoritative",
            "--no-ping",
            "--user=root",
            "--log-facility=-",
            &leases,
            &pid,
        ])
    }

    /// Serves the files of a directory by HTTP.
    pub fn http(&self, dir: &Path, port: u16) -> Result<Service> {
        let dir = dir.to_owned();
        self.tcp(port, move |stream, stop| answer_http(stream, stop, &dir))
    }

    /// Listens at a TCP port, greets with a banner, and then sends back what it gets.
    pub fn tcp_service(&self, port: u16, banner: &str) -> Result<Service> {
        let banner = banner.to_owned();
        self.tcp(port, move |mut stream, stop| {
            stream.write_all(banner.as_bytes())?;
            let mut data = [0; 4096];
            loop {
                match read(&mut stream, stop, &mut data)? {
                    0 => return Ok(()),
                    length => stream.write_all(&data[..length])?,
                }
            }
        })
    }

    /// Listens at a UDP port and sends back what it gets.
    pub fn udp_echo(&self, port: u16) -> Result<Service> {
        self.udp_service(port, |data| Some(data.to_vec()))
    }

    /// Answers each DNS query with the same address.
    pub fn dns_responder(&self, addr: Ipv4Addr) -> Result<Service> {
        self.udp_service(53, move |query| dns_answer(query, addr))
    }

    /// Listens at a UDP port and sends the answers that the closure gives.
    pub fn udp_service(
        &self,
        port: u16,
        mut answer: impl FnMut(&[u8]) -> Option<Vec<u8>> + Send + 'static,
    ) -> Result<Service> {
        let socket = self
            .enter(|| UdpSocket::bind(&everywhere(port)[..]))
            .with_context(|| format!("cannot listen at UDP port {port}"))?;
        socket.set_read_timeout(Some(TICK))?;
        Ok(Service::start(self, move |stop| {
            let mut data = vec![0; 1 << 16];
            while !stop.is_set() {
                let Ok((length, client)) = socket.recv_from(&mut data) else { continue };
                if let Some(answer) = answer(&data[..length]) {
                    let _ = socket.send_to(&answer, client);
                }
            }
        }))
    }

    /// Listens at a TCP port; each connection is served on a thread of its own. A socket stays in
    /// the namespace it was made in, so that the threads need not be there.
    fn tcp(
        &self,
        port: u16,
        serve: impl Fn(TcpStream, &Stop) -> io::Result<()> + Sync + Send + 'static,
    ) -> Result<Service> {
        let listener = self
            .enter(|| TcpListener::bind(&everywhere(port)[..]))
            .with_context(|| format!("cannot listen at TCP port {port}"))?;
        listener.set_nonblocking(true)?;
        Ok(Service::start(self, move |stop| {
            thread::scope(|scope| {
                while !stop.is_set() {
                    let Ok((stream, _)) = listener.accept() else {
                        thread::sleep(TICK);
                        continue;
                    };
                    let serve = &serve;
                    scope.spawn(move || {
                        // A client that goes away in the middle is no concern of the server.
                        let _ = stream
                            .set_nonblocking(false)
                            .and_then(|()| stream.set_read_timeout(Some(TICK)))
                            .and_then(|()| serve(stream, stop));
                    });
                }
            });
        }))
    }

    /// Connects to a TCP service, sends nothing, and returns what it says until its end.
    pub fn tcp_fetch(&self, addr: &str, timeout: Duration) -> Result<String> {
        let addr: SocketAddr = addr.parse()?;
        let mut stream = self
            .enter(|| TcpStream::connect_timeout(&addr, timeout))
            .with_context(|| format!("cannot connect to {addr}"))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.shutdown(Shutdown::Write)?;
        let mut text = String::new();
        stream.read_to_string(&mut text).with_context(|| format!("{addr} said {text:?}"))?;
        Ok(text)
    }

    /// Sends a UDP datagram and returns the answer, or `None` when none comes within `timeout`.
    pub fn udp_exchange(&self, addr: &str, data: &[u8], timeout: Duration) -> Result<Option<Vec<u8>>> {
        let addr: SocketAddr = addr.parse()?;
        let any: SocketAddr = match addr {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = self.enter(|| UdpSocket::bind(any))?;
        socket.connect(addr)?;
        socket.set_read_timeout(Some(timeout))?;
        socket.send(data)?;
        let mut answer = vec![0; 1 << 16];
        match socket.recv(&mut answer) {
            Ok(length) => Ok(Some(answer[..length].to_vec())),
            Err(error) if is_timeout(&error) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("no answer from {addr}")),
        }
    }

    /// Whether one ping is answered within a second.
    pub fn ping(&self, addr: &str) -> Result<bool> {
        let output = self.command("ping").args(["-n", "-c", "1", "-W", "1", addr]).output()?;
        match output.status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            _ => bail!("ping {addr}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Waits until a program listens at a TCP port.
    fn wait_listening(&self, mut process: Process, port: u16) -> Result<Process> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.enter(|| is_listening(port)) {
            let ended = process.ended()?;
            ensure!(ended.is_none(), "the server ended: {}", process.log());
            ensure!(Instant::now() < deadline, "nothing listens at {port}: {}", process.log());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(process)
    }
}

fn everywhere(port: u16) -> [SocketAddr; 2] {
    [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()]
}

/// Whether there is a listener in the network namespace of the calling thread.
fn is_listening(port: u16) -> bool {
    let address_end = format!(":{port:04X}");
    let listens = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let is_port = words.next().is_some_and(|local| local.ends_with(&address_end));
        is_port && words.nth(1) == Some("0A")
    };
    ["tcp", "tcp6"].iter().any(|table| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        text.lines().any(listens)
    })
}

/// Reads what comes next; 0 bytes are the end, of the stream or of the service.
fn read(stream: &mut TcpStream, stop: &Stop, data: &mut [u8]) -> io::Result<usize> {
    while !stop.is_set() {
        match stream.read(data) {
            Err(error) if is_timeout(&error) => {}
            result => return result,
        }
    }
    Ok(0)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn answer_http(mut stream: TcpStream, stop: &Stop, dir: &Path) -> io::Result<()> {
    let (mut request, mut data) = (Vec::new(), [0; 4096]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match read(&mut stream, stop, &mut data)? {
            0 => return Ok(()),
            length => request.extend_from_slice(&data[..length]),
        }
    }
    let path = String::from_utf8_lossy(&request).split(' ').nth(1).map(PathBuf::from);
    let name = path.as_deref().and_then(Path::file_name);
    let (status, body) = match name.map(|name| fs::read(dir.join(name))) {
        Some(Ok(body)) => ("200 OK", body),
        _ => ("404 Not Found", Vec::new()),
    };
    let length = body.len();
    write!(stream, "HTTP/1.0 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    stream.write_all(&body)
}

fn dns_answer(query: &[u8], addr: Ipv4Addr) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let id = query.get(..2)?;
    let name_end = HEADER + query.get(HEADER..)?.iter().position(|&byte| byte == 0)? + 1;
    let question = query.get(HEADER..name_end + 4)?;
    // A response without error; one question, one answer.
    let rest = [0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    // The name of the question, type A, class IN, a minute to live, 4 bytes.
    let answer = [0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4];
    Some([id, &rest, question, &answer, &addr.octets()].concat())
}
