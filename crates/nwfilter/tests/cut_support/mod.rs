//! Guests with connections that changes of rules end, or do not.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unreachable_pub)]

use std::net::Ipv4Addr;

use anyhow::Result;
use nwfilter::xml::{SetEntry, SetFamily, SetRange, read_binding, read_filter};
use nwfilter::{Backend, Config, Cut, Driver, Transaction};
use nwfilter_testlab::frames::{self, tcp_flags};
use nwfilter_testlab::{Ends, Host, Mac, Tap};

pub const GUEST: Mac = Mac::new([0x52, 0x54, 0x00, 0x7b, 0x35, 0x93]);
pub const PEER: Mac = Mac::new([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
/// The guest's address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// What the guest may open is up to `out`. To it come connections of the set's members to its port 22.
pub fn filter(out: &str) -> String {
    format!(
        "<filter name='f'><rule action='accept' direction='inout' priority='100'><all state='ESTABLISHED,RELATED'/></rule>
         <rule action='accept' direction='in' priority='200'>
           <tcp dstportstart='22' ipset='admins' ipsetflags='src' state='NEW'/></rule>
         <rule action='accept' direction='in' priority='200'><udp ipset='admins' ipsetflags='src' state='NEW'/></rule>
         {out}<rule action='drop' direction='inout' priority='900'><all/></rule></filter>"
    )
}

/// For [`filter`]: the guest opens whatever it wants.
pub const OPENS: &str = "<rule action='accept' direction='out' priority='300'><all/></rule>";

/// The filtered guest `tap0` and its neighbour `tap1`.
pub struct Lab {
    pub host: Host,
    pub driver: Driver,
    pub guest: Tap,
    pub peer: Tap,
    _dir: tempfile::TempDir,
}

impl Lab {
    pub fn new(host: Host, backend: impl Backend + 'static, filter: &str) -> Result<Self> {
        let (guest, peer) = (host.tap("tap0")?, host.tap("tap1")?);
        let dir = tempfile::tempdir()?;
        let config = Config::new(dir.path().join("filters"), dir.path().join("bindings"));
        let driver = Driver::builder().config(config).without_learner().open(backend)?;
        let lab = Self { host, driver, guest, peer, _dir: dir };
        let set = "<filterset name='admins' family='ipv4'><entry value='10.0.0.8'/><entry value='10.0.0.9'/></filterset>";
        lab.host.enter(|| lab.driver.define_set("s.xml", set))?;
        lab.host.enter(|| lab.driver.define_filter("f.xml", filter))?;
        lab.bind("tap0")?;
        Ok(lab)
    }

    pub fn bind(&self, port: &str) -> Result<()> {
        self.bind_with(port, &format!("<parameter name='IP' value='{ADDRESS}'/>"))
    }

    pub fn unbind(&self, port: &str) -> Result<()> {
        self.host.enter(|| self.driver.delete_binding(&port.parse().unwrap()))?;
        Ok(())
    }

    pub fn bind_with(&self, port: &str, parameter: &str) -> Result<()> {
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='{GUEST}'/><filterref filter='f'>{parameter}</filterref>
             </filterbinding>"
        );
        let binding = read_binding("b.xml", &binding).into_result()?;
        self.host.enter(|| self.driver.create_binding(binding))?;
        Ok(())
    }

    /// Commits a change that cuts, and says what it ended.
    pub fn cut(&self, change: impl FnOnce(&mut Transaction) -> &mut Transaction) -> Result<Cut> {
        let mut transaction = Transaction::new();
        change(&mut transaction).cut_connections();
        Ok(self.host.enter(|| self.driver.commit(transaction))?.cut)
    }

    /// Takes an address out of the set with its connections.
    pub fn revoke(&self, address: &str) -> Result<Cut> {
        let range = SetRange::parse(SetFamily::Ipv4, address).unwrap();
        self.cut(|transaction| transaction.remove_from_set(&"admins".parse().unwrap(), vec![range]))
    }

    /// The same, but the connections stay.
    pub fn remove(&self, address: &str) -> Result<()> {
        let range = SetRange::parse(SetFamily::Ipv4, address).unwrap();
        let mut transaction = Transaction::new();
        transaction.remove_from_set(&"admins".parse()?, vec![range]);
        self.host.enter(|| self.driver.commit(transaction))?;
        Ok(())
    }

    pub fn add(&self, address: &str) -> Result<()> {
        let range = SetRange::parse(SetFamily::Ipv4, address).unwrap();
        let mut transaction = Transaction::new();
        transaction.add_to_set(&"admins".parse()?, vec![SetEntry::from(range)]);
        self.host.enter(|| self.driver.commit(transaction))?;
        Ok(())
    }

    /// Defines the filter anew with its connections cut.
    pub fn define(&self, filter: &str) -> Result<Cut> {
        let filter = read_filter("f.xml", filter).into_result()?;
        self.cut(|transaction| transaction.define_filter(filter))
    }

    /// A TCP connection from a neighbour to the guest.
    pub fn to_guest(&self, address: &str, port: u16) -> Tcp<'_> {
        Tcp { opener: &self.peer, other: &self.guest, ends: ends(address), ports: (port, 22) }
    }

    /// A TCP connection from the guest to a neighbour.
    pub fn of_guest(&self, address: &str, port: u16) -> Tcp<'_> {
        let ends = ends(address).reverse();
        Tcp { opener: &self.guest, other: &self.peer, ends, ports: (1000, port) }
    }
}

/// From a neighbour to the guest.
pub fn ends(address: &str) -> Ends {
    Ends::v4(PEER, address.parse().unwrap(), GUEST, ADDRESS)
}

/// A TCP connection.
pub struct Tcp<'a> {
    pub opener: &'a Tap,
    pub other: &'a Tap,
    pub ends: Ends,
    pub ports: (u16, u16),
}

impl Tcp<'_> {
    /// Whether the handshake comes through.
    pub fn opens(&self) -> Result<bool> {
        let (there, back) = (self.ports, (self.ports.1, self.ports.0));
        let open = frames::tcp_segment(&self.ends, there, (1, 0), tcp_flags::SYN, &[]);
        let flags = tcp_flags::SYN | tcp_flags::ACK;
        let answer = frames::tcp_segment(&self.ends.reverse(), back, (1, 2), flags, &[]);
        let done = frames::tcp_segment(&self.ends, there, (2, 2), tcp_flags::ACK, &[]);
        Ok(self.opener.delivers(self.other, &open)?
            && self.other.delivers(self.opener, &answer)?
            && self.opener.delivers(self.other, &done)?)
    }

    /// Whether data of its opener comes through.
    pub fn carries(&self) -> Result<bool> {
        let flags = tcp_flags::PSH | tcp_flags::ACK;
        let data = frames::tcp_segment(&self.ends, self.ports, (2, 2), flags, b"data");
        self.opener.delivers(self.other, &data)
    }

    /// Whether data of the other end comes through.
    pub fn carries_back(&self) -> Result<bool> {
        let flags = tcp_flags::PSH | tcp_flags::ACK;
        let back = (self.ports.1, self.ports.0);
        let data = frames::tcp_segment(&self.ends.reverse(), back, (2, 2), flags, b"data");
        self.other.delivers(self.opener, &data)
    }
}
