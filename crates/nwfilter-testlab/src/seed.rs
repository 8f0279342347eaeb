//! The traffic that the FTP filters of the libvirt manual decide about: who may talk to whom, tried with real
//! programs and with raw frames.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::frames::{self, Arp, tcp_flags};
use crate::{Ends, Guest, Host, Mac, Netns, Process, Service, Tap};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const TAP_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
const OBSERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
const SOMEBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 99);

/// Length of the file that is fetched: more than the buffers on the way hold.
const FILE_BYTES: usize = 3_000_000;
/// How long an answer may take that is expected.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long is waited for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(700);

/// A bridge with a guest that serves FTP, SSH and HTTP behind the port `vnet0`, a guest of raw frames behind `tap0`,
/// and an unfiltered client and observer outside.
#[derive(Debug)]
pub struct SeedLab {
    host: Host,
    server: Guest,
    client: Guest,
    tap: Tap,
    observer: Tap,
    file: Vec<u8>,
    _dir: TempDir,
    _ftp: Process,
    _services: Vec<Service>,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What, in plain words.
    pub what: &'static str,
    /// What the manual promises.
    pub expected: Outcome,
    /// What happened.
    pub seen: Outcome,
}

impl Check {
    /// Whether what happened is what was promised.
    pub fn holds(&self) -> bool {
        self.expected == self.seen
    }
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It got through.
    Passes,
    /// Nothing arrived.
    Dropped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Outcome::Passes => "passes",
            Outcome::Dropped => "dropped",
        })
    }
}

fn outcome(passes: bool) -> Outcome {
    if passes { Outcome::Passes } else { Outcome::Dropped }
}

impl SeedLab {
    /// The ports that are to be filtered.
    pub const PORTS: [&str; 2] = ["vnet0", "tap0"];

    /// Builds the lab and starts the servers in it.
    pub fn new() -> Result<Self> {
        let host = Host::new()?;
        let server = host.guest("vnet0", mac(2)).addr(&format!("{SERVER}/24")).start()?;
        let client = host.guest("outside0", mac(1)).addr(&format!("{CLIENT}/24")).start()?;
        let (tap, observer) = (host.tap("tap0")?, host.tap("outside1")?);
        let dir = tempfile::tempdir()?;
        let file: Vec<u8> = (0..FILE_BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(dir.path().join("file"), &file)?;
        let ftp = server.vsftpd(dir.path())?;
        let services = vec![
            server.http(dir.path(), 80)?,
            server.tcp_service(22, "SSH-2.0-lab\r\n")?,
            server.tcp_service(8081, "closed\r\n")?,
            client.dns_responder("192.0.2.7".parse()?)?,
            client.udp_echo(54)?,
            client.tcp_service(80, "outside\r\n")?,
        ];
        Ok(Self { host, server, client, tap, observer, file, _dir: dir, _ftp: ftp, _services: services })
    }

    /// The host of both ports.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The guest of raw frames behind `tap0` with MAC address `52:54:00:00:00:03`, and the observer outside with `…:04`.
    pub fn taps(&self) -> (&Tap, &Tap) {
        (&self.tap, &self.observer)
    }

    /// From the guest of raw frames to the observer.
    pub fn ends() -> Ends {
        from_guest(TAP_GUEST)
    }

    /// The binding of one of [`SeedLab::PORTS`] to a filter.
    pub fn binding(&self, port: &str, filter: &str) -> String {
        let (mac, ip) = match port {
            "vnet0" => (mac(2), SERVER),
            _ => (mac(3), TAP_GUEST),
        };
        format!(
            "<filterbinding>
  <owner><name>{port}-guest</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='{port}'/>
  <mac address='{mac}'/>
  <filterref filter='{filter}'><parameter name='IP' value='{ip}'/></filterref>
</filterbinding>"
        )
    }

    /// Tries everything, calling `tell` with each result as it comes.
    pub fn checks(&self, mut tell: impl FnMut(&Check)) -> Result<Vec<Check>> {
        type Attempt = fn(&SeedLab) -> Result<bool>;
        use Outcome::{Dropped, Passes};
        let attempts: [(&'static str, Outcome, Attempt); 19] = [
            ("a file is fetched by FTP in active mode, byte for byte", Passes, Self::ftp),
            ("the same file by HTTP on port 80", Passes, Self::http),
            ("TCP to port 22 of the guest", Passes, |lab| lab.tcp(22)),
            ("TCP to port 8081 of the guest", Dropped, |lab| lab.tcp(8081)),
            ("the guest pings out", Passes, |lab| lab.server.ping(&CLIENT.to_string())),
            ("somebody pings the guest", Dropped, |lab| lab.client.ping(&SERVER.to_string())),
            ("the guest asks a DNS server", Passes, |lab| lab.udp_out(53, &dns_query())),
            ("the guest sends UDP to another port", Dropped, |lab| lab.udp_out(54, b"hello")),
            ("the guest opens a connection to a web server", Dropped, |lab| {
                Ok(lab.server.tcp_fetch(&format!("{CLIENT}:80"), SILENCE).is_ok())
            }),
            ("a frame with the guest's own MAC and IP address (UDP to port 53)", Passes, |lab| {
                lab.sent(&frames::udp(&from_guest(TAP_GUEST), 4000, 53, b"q"))
            }),
            ("the same from another MAC address", Dropped, |lab| {
                lab.sent(&frames::udp(&from_guest(TAP_GUEST).with_src_mac(mac(9)), 4000, 53, b"q"))
            }),
            ("the same from another IP address", Dropped, |lab| {
                lab.sent(&frames::udp(&from_guest(SOMEBODY), 4000, 53, b"q"))
            }),
            ("an ARP request that names the guest as sender", Passes, |lab| lab.arp(mac(3), TAP_GUEST)),
            ("an ARP request that names another IP address", Dropped, |lab| lab.arp(mac(3), SOMEBODY)),
            ("an ARP request that names another MAC address", Dropped, |lab| lab.arp(mac(9), TAP_GUEST)),
            ("an IPv6 packet of the guest", Dropped, |lab| lab.sent(&frames::udp(&ipv6(), 4000, 53, b"q"))),
            ("an IPv6 packet to the guest", Dropped, |lab| {
                lab.observer.delivers(&lab.tap, &frames::udp(&ipv6().reverse(), 53, 4000, b"a"))
            }),
            ("a TCP connection to port 80 of the guest begins", Passes, |lab| {
                let to_guest = from_guest(TAP_GUEST).reverse();
                lab.observer.delivers(&lab.tap, &frames::tcp(&to_guest, 4001, 80, tcp_flags::SYN))
            }),
            ("a TCP packet from port 80 that answers nobody", Dropped, |lab| {
                let (syn, ack) = (tcp_flags::SYN, tcp_flags::ACK);
                lab.sent(&frames::tcp(&from_guest(TAP_GUEST), 80, 4002, syn | ack))
            }),
        ];
        let mut checks = Vec::new();
        for (what, expected, attempt) in attempts {
            let seen = outcome(attempt(self).with_context(|| what)?);
            let check = Check { what, expected, seen };
            tell(&check);
            checks.push(check);
        }
        Ok(checks)
    }

    /// Whether the client gets the file by FTP in passive mode, unchanged: the data connection goes to the guest.
    pub fn passive_ftp(&self) -> Result<bool> {
        self.curl(&[&format!("ftp://{SERVER}/file")])
    }

    /// Whether the client gets the file by FTP in active mode, unchanged: the data connection comes from the guest.
    pub fn ftp(&self) -> Result<bool> {
        self.curl(&["--ftp-port", "-", &format!("ftp://{SERVER}/file")])
    }

    fn http(&self) -> Result<bool> {
        self.curl(&[&format!("http://{SERVER}/file")])
    }

    /// The same as [`SeedLab::ftp`] with time enough for a busy machine.
    pub fn ftp_in_a_minute(&self) -> Result<bool> {
        let patience = ["--connect-timeout", "30", "--max-time", "60"];
        self.curl(&[&patience[..], &["--ftp-port", "-", &format!("ftp://{SERVER}/file")]].concat())
    }

    /// Whether the host itself gets the file by FTP from the guest, in active or passive mode, unchanged. The bridge needs an
    /// address.
    pub fn ftp_of_host(&self, active: bool) -> Result<bool> {
        let mode: &[&str] = if active { &["--ftp-port", "-"] } else { &["--ftp-pasv"] };
        self.curl_in(self.host.netns(), &[mode, &[&format!("ftp://{SERVER}/file")]].concat())
    }

    /// Whether the client gets the file, unchanged.
    fn curl(&self, args: &[&str]) -> Result<bool> {
        self.curl_in(&self.client, args)
    }

    fn curl_in(&self, netns: &Netns, args: &[&str]) -> Result<bool> {
        let got = tempfile::NamedTempFile::new()?;
        let path = got.path().to_str().context("path is no text")?;
        let limits = ["--silent", "--connect-timeout", "3", "--max-time", "8", "--output", path];
        let status = netns.command("curl").args(limits).args(args).status().context("cannot run curl")?;
        Ok(status.success() && fs::read(got.path())? == self.file)
    }

    fn tcp(&self, port: u16) -> Result<bool> {
        let patience = if port == 22 { PATIENCE } else { SILENCE };
        Ok(self.client.tcp_fetch(&format!("{SERVER}:{port}"), patience).is_ok())
    }

    fn udp_out(&self, port: u16, data: &[u8]) -> Result<bool> {
        let patience = if port == 53 { PATIENCE } else { SILENCE };
        Ok(self.server.udp_exchange(&format!("{CLIENT}:{port}"), data, patience)?.is_some())
    }

    fn sent(&self, frame: &[u8]) -> Result<bool> {
        self.tap.delivers(&self.observer, frame)
    }

    fn arp(&self, sender_mac: Mac, sender_ip: Ipv4Addr) -> Result<bool> {
        let request = Arp::request(sender_mac, sender_ip, CLIENT);
        self.sent(&frames::arp(mac(3), Mac::BROADCAST, request))
    }
}

fn mac(last: u8) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, last])
}

/// From the guest of raw frames, under some IP address, to the observer.
fn from_guest(src: Ipv4Addr) -> Ends {
    Ends::v4(mac(3), src, mac(4), OBSERVER)
}

fn ipv6() -> Ends {
    let addr = |last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last);
    Ends::v6(mac(3), addr(3), mac(4), addr(4))
}

/// A question for the address of `example.org` (RFC 1035, section 4.1).
fn dns_query() -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["example", "org"] {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}
