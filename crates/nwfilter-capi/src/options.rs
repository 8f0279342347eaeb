//! What a driver is opened with.

use std::ffi::c_char;
use std::time::Duration;

use nwfilter::Config;

use crate::error::Failure;
use crate::input::{self, Structure};

/// What enforces the rules.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nwf_backend {
    /// The one that filters ports of this host already; else nftables where the kernel has what it needs and no stored
    /// filter names an ipset of the host; else xtables.
    NWF_BACKEND_AUTO = 0,
    /// One nftables table, over netlink.
    NWF_BACKEND_NFTABLES = 1,
    /// iptables, ip6tables and ebtables, with the chains of libvirt's driver.
    NWF_BACKEND_XTABLES = 2,
    /// No kernel: the rules are kept in memory, and every port has an interface. For tests of managers, without root.
    NWF_BACKEND_FAKE = 3,
}

/// Whose stores a driver works on.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum nwf_stores {
    /// The driver's own: a damaged file is moved aside, and what is dangerous in a stored filter is refused.
    NWF_STORES_OWN = 0,
    /// libvirt's: files stay where they are and are read as libvirt reads them.
    NWF_STORES_LIBVIRT = 1,
}

/// nwf_options.flags: starts no thread that learns the addresses of guests.
pub const NWF_OPEN_WITHOUT_LEARNER: u32 = 1;
/// nwf_options.flags: refuses IP rules where bridge-nf-call-iptables is off, instead of switching it on (xtables).
pub const NWF_OPEN_KEEP_BRIDGE_NF: u32 = 2;
/// nwf_options.flags: gives no connection a conntrack helper (xtables).
pub const NWF_OPEN_WITHOUT_HELPERS: u32 = 4;
/// nwf_options.flags: owns the table from the first change on, and changes it for other processes, so that nobody else removes
/// it (nftables, from Linux 6.9). For a process that stays, and works in one network namespace.
pub const NWF_OPEN_OWNER: u32 = 8;

/// What a driver is opened with. Bytes that are zero ask for the default, so that a caller sets size and what differs:
/// nwf_options options = {.size = sizeof options, .backend = NWF_BACKEND_FAKE};
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct nwf_options {
    /// sizeof(nwf_options)
    pub size: usize,
    /// The filter store. Null: /etc/nwfilter, or /etc/libvirt/nwfilter for libvirt's stores.
    pub config_dir: *const c_char,
    /// The bytes of config_dir, or NWF_ZERO_TERMINATED.
    pub config_dir_length: usize,
    /// The binding store. Null: /run/nwfilter, or /run/libvirt/nwfilter-binding for libvirt's stores.
    pub state_dir: *const c_char,
    /// The bytes of state_dir, or NWF_ZERO_TERMINATED.
    pub state_dir_length: usize,
    /// What enforces the rules: an nwf_backend.
    pub backend: i32,
    /// Whose stores they are: an nwf_stores.
    pub stores: i32,
    /// NWF_OPEN_… together.
    pub flags: u32,
    /// How many milliseconds a change waits for another process that keeps the stores locked; 0 waits without limit.
    pub patience: u32,
}

// SAFETY: it is repr(C), begins with its size, and is made of numbers and pointers.
unsafe impl Structure for nwf_options {
    const FIRST_SIZE: usize = 56;

    fn set_size(&mut self, size: usize) {
        self.size = size;
    }
}

/// Options that were checked.
pub(crate) struct Options {
    pub(crate) config: Config,
    pub(crate) backend: nwf_backend,
    pub(crate) flags: u32,
}

impl Options {
    /// Reads the options of a caller; null asks for the default of each.
    pub(crate) unsafe fn read(options: *const nwf_options) -> Result<Self, Failure> {
        if options.is_null() {
            return Ok(Self { config: Config::default(), backend: nwf_backend::NWF_BACKEND_AUTO, flags: 0 });
        }
        // SAFETY: by the contract of the header it is a structure that begins with its size.
        let given = unsafe { input::sized(options, "options") }?;
        let backend = match given.backend {
            0 => nwf_backend::NWF_BACKEND_AUTO,
            1 => nwf_backend::NWF_BACKEND_NFTABLES,
            2 => nwf_backend::NWF_BACKEND_XTABLES,
            3 => nwf_backend::NWF_BACKEND_FAKE,
            other => return Err(Failure::argument(format!("options.backend is {other}, and is no backend"))),
        };
        let mut config = match given.stores {
            0 => Config::default(),
            1 => Config::libvirt(),
            other => return Err(Failure::argument(format!("options.stores is {other}, and is no layout"))),
        };
        const KNOWN: u32 =
            NWF_OPEN_WITHOUT_LEARNER | NWF_OPEN_KEEP_BRIDGE_NF | NWF_OPEN_WITHOUT_HELPERS | NWF_OPEN_OWNER;
        if given.flags & !KNOWN != 0 {
            let why = format!("options.flags has unknown bits: {:#x}", given.flags & !KNOWN);
            return Err(Failure::argument(why));
        }
        let directories = [
            (given.config_dir, given.config_dir_length, "options.config_dir", &mut config.config_dir),
            (given.state_dir, given.state_dir_length, "options.state_dir", &mut config.state_dir),
        ];
        for (data, length, what, directory) in directories {
            // SAFETY: by the contract of the header it is null or a text of that length.
            match unsafe { input::optional_text(data, length, what) }? {
                Some("") => return Err(Failure::argument(format!("{what} is empty"))),
                Some(path) if path.contains('\0') => {
                    return Err(Failure::argument(format!("{what} has a zero byte in it")));
                }
                Some(path) => *directory = path.into(),
                None => (),
            }
        }
        config.patience = (given.patience > 0).then(|| Duration::from_millis(given.patience.into()));
        Ok(Self { config, backend, flags: given.flags })
    }
}
