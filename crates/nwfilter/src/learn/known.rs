//! The known addresses of guests, in files that outlive the process.
//!
//! Leases are in libvirt's format: a line `EXPIRY UUID-MAC ADDRESS SERVER` for each granted lease. The expiry is in seconds
//! since the epoch, 0 if the lease has ended. The last line about an address counts. IPv6 leases are in a file of their own,
//! because libvirt has none. A third file has the addresses that were learned in other ways.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nwfilter_xml::{Binding, MacAddr, PortDev, Uuid};

use super::packets::usable;
use super::port::{MAX_LEASES, is_link_local};
use super::{Family, Source};
use crate::{Clock, Error, atomic};

/// The expiry of a lease without end, as libvirt writes it.
const NEVER: u64 = u64::MAX;
/// The log of leases is rewritten when it has more than three lines for each lease, and this many besides.
const SPARE_LINES: usize = 64;

/// Identifies a guest's interface, independent of its current port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GuestKey {
    owner: Uuid,
    mac: MacAddr,
}

impl GuestKey {
    pub(crate) fn of(binding: &Binding) -> Self {
        Self { owner: binding.owner.uuid, mac: binding.mac }
    }

    fn parse(text: &str) -> Option<Self> {
        let (owner, mac) = text.split_at_checked(uuid::fmt::Hyphenated::LENGTH)?;
        Some(Self { owner: owner.parse().ok()?, mac: mac.strip_prefix('-')?.parse().ok()? })
    }
}

impl std::fmt::Display for GuestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.owner, self.mac)
    }
}

/// An address that a DHCP server granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) address: IpAddr,
    pub(crate) server: IpAddr,
    /// In seconds since the epoch; `None` for never.
    pub(crate) expires: Option<u64>,
}

impl Lease {
    pub(crate) fn holds_at(&self, now: u64) -> bool {
        self.expires.is_none_or(|expires| expires > now)
    }
}

/// A lease in the log.
#[derive(Clone, Copy, Debug)]
struct Kept {
    lease: Lease,
    /// The number of entries in the log when the lease was last granted.
    granted: u64,
}

/// Addresses that were learned from a guest's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Learned {
    pub(crate) source: Source,
    pub(crate) addresses: Vec<IpAddr>,
}

/// What is known from a guest's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Learned(Learned),
    /// It uses an address that belongs to the host or to another guest, and no other.
    Refused(IpAddr),
}

impl Seen {
    fn family(&self) -> Option<Family> {
        match self {
            Self::Learned(learned) => learned.addresses.first().map(|address| Family::of(*address)),
            Self::Refused(address) => Some(Family::of(*address)),
        }
    }
}

/// A change of what is known about a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It uses an address.
    Learned { guest: GuestKey, address: IpAddr, source: Source },
    /// A server granted it an address, or extended a lease.
    Granted { guest: GuestKey, lease: Lease },
    /// It uses an address that belongs to the host or to another guest.
    Refused { guest: GuestKey, address: IpAddr },
    /// It has lost an address.
    Ended { guest: GuestKey, address: IpAddr, why: &'static str },
    /// Its lease has run out, unless it was extended meanwhile.
    Expired { guest: GuestKey, address: IpAddr },
}

impl Change {
    pub(crate) fn guest(&self) -> GuestKey {
        match self {
            Self::Learned { guest, .. }
            | Self::Granted { guest, .. }
            | Self::Refused { guest, .. }
            | Self::Ended { guest, .. }
            | Self::Expired { guest, .. } => *guest,
        }
    }
}

/// What was known about the guests of some ports.
pub(crate) struct Forgotten(Vec<(PortDev, (GuestKey, Seen))>);

/// The three files.
#[derive(Clone)]
pub(crate) struct Known {
    clock: Clock,
    leases: LeaseFile,
    leases6: LeaseFile,
    learned: LearnedFile,
}

impl Known {
    pub(crate) fn new(state_dir: &Path, clock: Clock) -> Self {
        let leases = lease_path(state_dir);
        let leases6 = leases.with_extension("leases6");
        let learned = LearnedFile { path: state_dir.join("learned"), ..LearnedFile::default() };
        let leases = LeaseFile::new(leases, Family::Ipv4);
        Self { clock, leases, leases6: LeaseFile::new(leases6, Family::Ipv6), learned }
    }

    /// The time in seconds since the epoch, as in the lease files.
    pub(crate) fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Reads what other processes wrote since the last call. Damaged lines are ignored.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        self.leases.refresh()?;
        self.leases6.refresh()?;
        self.learned.refresh()
    }

    /// What was learned about the guest of a port.
    pub(crate) fn learned(&self, port: &PortDev, guest: GuestKey, family: Family) -> Option<&Learned> {
        match self.seen(port, guest, family)? {
            Seen::Learned(learned) => Some(learned),
            Seen::Refused(_) => None,
        }
    }

    /// The refused address that the guest of a port uses, if no other of its addresses is known.
    pub(crate) fn refused(&self, port: &PortDev, guest: GuestKey, family: Family) -> Option<IpAddr> {
        match self.seen(port, guest, family)? {
            Seen::Learned(_) => None,
            Seen::Refused(address) => Some(*address),
        }
    }

    fn seen(&self, port: &PortDev, guest: GuestKey, family: Family) -> Option<&Seen> {
        let (of, seen) = self.learned.entries.get(port)?;
        (*of == guest && seen.family() == Some(family)).then_some(seen)
    }

    /// The leases of a guest, including those that have run out and are not yet removed.
    pub(crate) fn leases(&self, guest: GuestKey, family: Family) -> impl Iterator<Item = &Lease> {
        self.file(family).leases.get(&guest).into_iter().flatten().map(|kept| &kept.lease)
    }

    /// Forgets what was learned about the guests of ports, and returns it. Leases stay, because a guest may come back while
    /// they run.
    pub(crate) fn forget(&mut self, ports: &BTreeSet<PortDev>) -> Result<Forgotten, Error> {
        let entries = &mut self.learned.entries;
        let forgotten: Vec<_> = ports.iter().filter_map(|port| entries.remove_entry(port)).collect();
        if !forgotten.is_empty() {
            self.learned.write()?;
        }
        Ok(Forgotten(forgotten))
    }

    /// Restores what [`Self::forget`] returned. What cannot be written will be learned again.
    pub(crate) fn remember(&mut self, forgotten: Forgotten) {
        if forgotten.0.is_empty() {
            return;
        }
        self.learned.entries.extend(forgotten.0);
        if let Err(error) = self.learned.write() {
            log::error!("what was learned is lost: {error}");
        }
    }

    /// Stores changes. Returns the ports whose guests have other addresses now.
    pub(crate) fn record(&mut self, changes: &[(PortDev, Change)]) -> Result<BTreeSet<PortDev>, Error> {
        let now = self.now();
        let mut affected = BTreeSet::new();
        let mut learned = false;
        for (port, change) in changes {
            let differs = match change {
                Change::Learned { guest, address, source } => {
                    let differs = self.learned.learn(port, *guest, *address, *source);
                    learned |= differs;
                    differs
                }
                Change::Refused { guest, address } => {
                    let differs = self.learned.refuse(port, *guest, *address);
                    learned |= differs;
                    differs
                }
                Change::Granted { guest, lease } => {
                    self.file_mut(Family::of(lease.address)).grant(*guest, *lease, now)
                }
                Change::Ended { guest, address, .. } => {
                    self.file_mut(Family::of(*address)).end(*guest, *address, |_| true)
                }
                Change::Expired { guest, address } => {
                    let ran_out = |lease: &Lease| !lease.holds_at(now);
                    self.file_mut(Family::of(*address)).end(*guest, *address, ran_out)
                }
            };
            if differs {
                tell(port, change);
                affected.insert(port.clone());
            }
        }
        if learned {
            self.learned.write()?;
        }
        self.leases.flush(now)?;
        self.leases6.flush(now)?;
        Ok(affected)
    }

    fn file(&self, family: Family) -> &LeaseFile {
        match family {
            Family::Ipv4 => &self.leases,
            Family::Ipv6 => &self.leases6,
        }
    }

    fn file_mut(&mut self, family: Family) -> &mut LeaseFile {
        match family {
            Family::Ipv4 => &mut self.leases,
            Family::Ipv6 => &mut self.leases6,
        }
    }
}

fn tell(port: &PortDev, change: &Change) {
    let nwfilter_port = port.as_str();
    match change {
        Change::Learned { address, source, .. } => {
            log::info!(nwfilter_port; "{port}: address {address} learned ({source})")
        }
        Change::Granted { lease, .. } => {
            log::info!(nwfilter_port; "{port}: address {} leased by {}", lease.address, lease.server);
        }
        // The caller logs whose address it is.
        Change::Refused { .. } => (),
        Change::Ended { address, why, .. } => {
            log::info!(nwfilter_port; "{port}: address {address} taken away: {why}")
        }
        Change::Expired { address, .. } => {
            log::info!(nwfilter_port; "{port}: address {address} taken away: its lease ran out")
        }
    }
}

/// The file of the IPv4 leases. For libvirt's binding store it is libvirt's own lease file.
fn lease_path(state_dir: &Path) -> PathBuf {
    const NAME: &str = "nwfilter.leases";
    match state_dir.parent() {
        Some(parent) if state_dir.ends_with("nwfilter-binding") => parent.join("network").join(NAME),
        _ => state_dir.join(NAME),
    }
}

/// Identifies the version of a file that was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamp(Option<(u64, i64, i64, u64)>);

impl Stamp {
    fn of(file: &Metadata) -> Self {
        Self(Some((file.ino(), file.mtime(), file.mtime_nsec(), file.size())))
    }

    fn of_path(path: &Path) -> Result<Self, Error> {
        fs::metadata(path)
            .map(|file| Self::of(&file))
            .map_err(|source| Error::Store { path: path.to_owned(), source })
    }
}

/// Reads a file if it has changed since `stamp`, and updates the stamp.
fn read_changed(path: &Path, stamp: &mut Stamp) -> Result<Option<String>, Error> {
    let failed = |source| Error::Store { path: path.to_owned(), source };
    let current = match fs::metadata(path) {
        Ok(file) => Stamp::of(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Stamp(None),
        Err(source) => return Err(failed(source)),
    };
    if current == *stamp {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    match open_regular(path, File::options().read(true)) {
        Ok(mut file) => {
            *stamp = Stamp::of(&file.metadata().map_err(failed)?);
            file.read_to_end(&mut bytes).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => *stamp = Stamp(None),
        Err(source) => return Err(failed(source)),
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Opens a regular file. Opening a pipe in its place would block.
fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Replaces a file without waiting for the disk: what is lost in a crash of the machine is learned again.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let failed = |source| Error::Store { path: path.to_owned(), source };
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(failed)?;
    atomic::replace(path, text.as_bytes()).map_err(failed)
}

// ---- leases ----

#[derive(Clone)]
struct LeaseFile {
    path: PathBuf,
    family: Family,
    stamp: Stamp,
    leases: BTreeMap<GuestKey, Vec<Kept>>,
    /// The number of entries that were read or added.
    entries: u64,
    /// The number of lines in the file.
    lines: usize,
    /// Lines that are not in the file yet.
    unwritten: String,
}

impl LeaseFile {
    fn new(path: PathBuf, family: Family) -> Self {
        let (stamp, leases) = (Stamp::default(), BTreeMap::new());
        Self { path, family, stamp, leases, entries: 0, lines: 0, unwritten: String::new() }
    }

    fn refresh(&mut self) -> Result<(), Error> {
        let Some(text) = read_changed(&self.path, &mut self.stamp)? else { return Ok(()) };
        self.leases.clear();
        self.lines = 0;
        for line in text.lines() {
            self.lines += 1;
            match parse_lease(line, self.family) {
                Some((guest, Entry::Holds(lease))) => {
                    self.set(guest, lease);
                }
                Some((guest, Entry::Ended(address))) => {
                    remove(&mut self.leases, guest, address, |_| true);
                }
                None => log::debug!("{}:{}: no lease: {line}", self.path.display(), self.lines),
            }
        }
        Ok(())
    }

    /// Records a lease; `true` if the guest did not have the address before. If the guest then has too many leases, the one
    /// that was granted least recently ends.
    fn grant(&mut self, guest: GuestKey, lease: Lease, now: u64) -> bool {
        // An expired lease that is granted again counts as a new one and goes to the end.
        self.end(guest, lease.address, |old| !old.holds_at(now));
        while let Some(oldest) = self.one_too_many(guest, lease.address) {
            log::warn!(
                "{guest} has {MAX_LEASES} leases: that of {oldest} ends for that of {}",
                lease.address
            );
            self.end(guest, oldest, |_| true);
        }
        let is_new = self.set(guest, lease);
        self.log(lease.expires.unwrap_or(NEVER), guest, lease.address, lease.server);
        is_new
    }

    /// The address whose lease must end so that the guest can have another one.
    fn one_too_many(&self, guest: GuestKey, new: IpAddr) -> Option<IpAddr> {
        let known = self.leases.get(&guest).filter(|known| known.len() >= MAX_LEASES)?;
        let others = known.iter().all(|known| known.lease.address != new).then_some(known)?;
        others.iter().min_by_key(|known| known.granted).map(|oldest| oldest.lease.address)
    }

    /// Sets a lease; `true` if the guest did not have the address before.
    fn set(&mut self, guest: GuestKey, lease: Lease) -> bool {
        self.entries += 1;
        let kept = Kept { lease, granted: self.entries };
        let leases = self.leases.entry(guest).or_default();
        match leases.iter_mut().find(|known| known.lease.address == lease.address) {
            Some(known) => {
                *known = kept;
                false
            }
            None => {
                leases.push(kept);
                true
            }
        }
    }

    /// Ends the lease of an address if it matches; `true` if it did.
    fn end(&mut self, guest: GuestKey, address: IpAddr, is_such: impl Fn(&Lease) -> bool) -> bool {
        let ended = remove(&mut self.leases, guest, address, is_such);
        if let Some(lease) = ended {
            self.log(0, guest, address, lease.server);
        }
        ended.is_some()
    }

    fn log(&mut self, expiry: u64, guest: GuestKey, address: IpAddr, server: IpAddr) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.unwritten, "{expiry} {guest} {address} {server}");
    }

    /// Appends the new lines, or rewrites the file if most of its lines are out of date.
    fn flush(&mut self, now: u64) -> Result<(), Error> {
        let lines = std::mem::take(&mut self.unwritten);
        if lines.is_empty() {
            return Ok(());
        }
        self.lines += lines.lines().count();
        let count: usize = self.leases.values().map(Vec::len).sum();
        if self.lines > 3 * count + SPARE_LINES {
            for (guest, leases) in &self.leases {
                for lease in leases.iter().map(|kept| kept.lease).filter(|lease| lease.holds_at(now)) {
                    let expiry = lease.expires.unwrap_or(NEVER);
                    let _ = writeln!(self.unwritten, "{expiry} {guest} {} {}", lease.address, lease.server);
                }
            }
            let text = std::mem::take(&mut self.unwritten);
            replace(&self.path, &text)?;
            self.lines = text.lines().count();
        } else {
            append(&self.path, &lines)?;
        }
        self.stamp = Stamp::of_path(&self.path)?;
        Ok(())
    }
}

enum Entry {
    Holds(Lease),
    Ended(IpAddr),
}

/// Parses a line. `None` if it is no lease, or if no host of the family can have the address.
fn parse_lease(line: &str, family: Family) -> Option<(GuestKey, Entry)> {
    let mut words = line.split_ascii_whitespace();
    let expiry: u64 = words.next()?.parse().ok()?;
    let guest = GuestKey::parse(words.next()?)?;
    let address = words.next()?.parse().ok().and_then(usable).filter(|a| Family::of(*a) == family)?;
    let server: IpAddr = words.next()?.parse().ok()?;
    let expires = (expiry != NEVER).then_some(expiry);
    let entry =
        if expiry == 0 { Entry::Ended(address) } else { Entry::Holds(Lease { address, server, expires }) };
    words.next().is_none().then_some((guest, entry))
}

fn remove(
    leases: &mut BTreeMap<GuestKey, Vec<Kept>>,
    guest: GuestKey,
    address: IpAddr,
    is_such: impl Fn(&Lease) -> bool,
) -> Option<Lease> {
    let of_guest = leases.get_mut(&guest)?;
    let index = of_guest.iter().position(|kept| kept.lease.address == address && is_such(&kept.lease))?;
    let ended = of_guest.remove(index).lease;
    if of_guest.is_empty() {
        leases.remove(&guest);
    }
    Some(ended)
}

/// Appends whole lines to a file, whose last line may be incomplete.
fn append(path: &Path, lines: &str) -> Result<(), Error> {
    let write = || {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let mut file = open_regular(path, File::options().create(true).append(true).read(true))?;
        let length = file.metadata()?.len();
        let mut last = [b'\n'];
        if length > 0 {
            file.read_exact_at(&mut last, length - 1)?;
        }
        let separator = if last == [b'\n'] { "" } else { "\n" };
        file.write_all(format!("{separator}{lines}").as_bytes())
    };
    write().map_err(|source| Error::Store { path: path.to_owned(), source })
}

// ---- learned addresses ----

#[derive(Clone, Default)]
struct LearnedFile {
    path: PathBuf,
    stamp: Stamp,
    entries: BTreeMap<PortDev, (GuestKey, Seen)>,
}

impl LearnedFile {
    fn refresh(&mut self) -> Result<(), Error> {
        if let Some(text) = read_changed(&self.path, &mut self.stamp)? {
            self.entries = text.lines().filter_map(parse_learned).collect();
        }
        Ok(())
    }

    /// Records a learned address; `true` if it is new. Only the first IPv4 address, the first link-local and the first other
    /// IPv6 address are recorded.
    fn learn(&mut self, port: &PortDev, guest: GuestKey, address: IpAddr, source: Source) -> bool {
        if let Some((of, Seen::Learned(known))) = self.entries.get_mut(port)
            && *of == guest
            && known.addresses.iter().all(|other| Family::of(*other) == Family::of(address))
        {
            let is_known = match address {
                IpAddr::V4(_) => true,
                IpAddr::V6(_) => {
                    let link_local = is_link_local(address);
                    known.addresses.iter().any(|other| is_link_local(*other) == link_local)
                }
            };
            if !is_known {
                known.addresses.push(address);
                known.source = source;
            }
            return !is_known;
        }
        let learned = Learned { source, addresses: vec![address] };
        self.entries.insert(port.clone(), (guest, Seen::Learned(learned)));
        true
    }

    /// Records a refused address; `true` if it is new. A guest with a known address has none.
    fn refuse(&mut self, port: &PortDev, guest: GuestKey, address: IpAddr) -> bool {
        match self.entries.get(port) {
            Some((of, Seen::Learned(_))) if *of == guest => false,
            Some((of, Seen::Refused(old))) if *of == guest && *old == address => false,
            _ => {
                self.entries.insert(port.clone(), (guest, Seen::Refused(address)));
                true
            }
        }
    }

    fn write(&mut self) -> Result<(), Error> {
        let mut text = String::new();
        for (port, (guest, seen)) in &self.entries {
            // Writing to a String cannot fail.
            let _ = match seen {
                Seen::Learned(Learned { source, addresses }) => {
                    let addresses: String = addresses.iter().map(|address| format!(" {address}")).collect();
                    writeln!(text, "{port} {guest} {source}{addresses}")
                }
                Seen::Refused(address) => writeln!(text, "{port} {guest} {REFUSED} {address}"),
            };
        }
        replace(&self.path, &text)?;
        self.stamp = Stamp::of_path(&self.path)?;
        Ok(())
    }
}

/// Stands in the file where the source of a learned address would be.
const REFUSED: &str = "refused";

fn parse_learned(line: &str) -> Option<(PortDev, (GuestKey, Seen))> {
    let mut words = line.split_ascii_whitespace();
    let port = words.next()?.parse().ok()?;
    let guest = GuestKey::parse(words.next()?)?;
    let source = words.next()?;
    let addresses: Option<Vec<IpAddr>> = words.map(|word| word.parse().ok().and_then(usable)).collect();
    let addresses = addresses?;
    let first = *addresses.first()?;
    let seen = match source {
        REFUSED => Seen::Refused(first),
        source => Seen::Learned(Learned { source: Source::from_name(source)?, addresses }),
    };
    Some((port, (guest, seen)))
}
