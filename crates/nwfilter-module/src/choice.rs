//! Which backend the module filters with: its own setting first, then libvirt's, then what libvirt itself would take.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use nwfilter::{Backend, Config, with_causes};
use nwfilter_nftables::{LibvirtsTables, Nftables, remove_libvirts_tables, suits};
use nwfilter_settings::{Key, Settings, Source};
use nwfilter_xml::PortDev;
use nwfilter_xtables::Xtables;

/// The file of libvirt's own nwfilter driver, from libvirt 12 on.
const LIBVIRTS: &str = "/etc/libvirt/nwfilter.conf";
/// Where iptables may be. libvirt takes nftables where it is nowhere, unless it is told.
const IPTABLES: [&str; 4] =
    ["/usr/sbin/iptables", "/sbin/iptables", "/usr/bin/iptables", "/usr/local/sbin/iptables"];

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// iptables, ip6tables and ebtables, with the chains of libvirt's driver.
    Xtables,
    /// The native one.
    Nftables,
}

impl Choice {
    /// The choice for this host, which is logged. The error names what cannot be read.
    pub(crate) fn of_host(settings: &Settings, config: &Config) -> Result<Self, String> {
        let source = settings.source(Key::Backend);
        let own = settings.get(Key::Backend).filter(|_| *source != Source::Default);
        let (choice, why) = match own {
            Some("auto") => Self::found(config),
            Some(name) => (Self::named(name), source.to_string()),
            None => match libvirts(Path::new(LIBVIRTS))? {
                Some(choice) => (choice, LIBVIRTS.to_owned()),
                None if IPTABLES.iter().any(|path| Path::new(path).exists()) => {
                    (Self::Xtables, "no setting".to_owned())
                }
                None => (Self::Nftables, "no setting, and no iptables".to_owned()),
            },
        };
        log::info!("backend {choice:?}: {why}");
        Ok(choice)
    }

    fn named(name: &str) -> Self {
        if name == "nftables" { Self::Nftables } else { Self::Xtables }
    }

    /// What filters ports here already, or else is the best for this host.
    fn found(config: &Config) -> (Self, String) {
        let (native, why) = suits(&Nftables::new(), &Xtables::default(), || config.names_an_ip_set());
        (if native { Self::Nftables } else { Self::Xtables }, why)
    }

    /// Removes what the other backend, and libvirt's own drivers, left, once this one filters every port of these.
    pub(crate) fn take_over(self, bound: &BTreeSet<PortDev>, state_dir: &Path) {
        self.clear_other(state_dir);
        match remove_libvirts_tables(|port| bound.contains(port)) {
            Ok(LibvirtsTables::None) => {}
            Ok(LibvirtsTables::Removed(ports)) => {
                log::info!("the tables of libvirt's nftables driver are removed, with {} ports", ports.len());
            }
            Ok(LibvirtsTables::Left(ports)) => {
                let ports: Vec<_> = ports.iter().map(PortDev::as_str).collect();
                log::warn!(
                    "the tables of libvirt's nftables driver stay: they filter ports without binding: {}",
                    ports.join(", ")
                );
            }
            Err(error) => log::error!("{}", with_causes(&error)),
        }
    }

    fn clear_other(self, state_dir: &Path) {
        let other: Box<dyn Backend> = match self {
            Self::Xtables => Box::new(Nftables::new().beside(state_dir)),
            Self::Nftables => Box::new(Xtables::default()),
        };
        if !other.filters_ports() {
            return;
        }
        match other.clear() {
            Ok(cleared) => {
                log::info!(
                    "the rules that {} had for {} ports are removed",
                    other.name(),
                    cleared.changed.len()
                );
            }
            Err(error) => log::error!("the rules of {} stay: {}", other.name(), with_causes(&error)),
        }
    }
}

/// What libvirt's file says, if there is one that says something.
fn libvirts(path: &Path) -> Result<Option<Choice>, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    firewall_backend(&text).map_err(|(line, value)| {
        format!(
            "{}:{line}: firewall_backend is {value}, but must be \"iptables\" or \"nftables\"",
            path.display()
        )
    })
}

/// The first `firewall_backend` of a file of libvirt's, which is the one that counts there. The error has the line and what
/// stands there.
fn firewall_backend(text: &str) -> Result<Option<Choice>, (usize, String)> {
    let settings = text.lines().enumerate().filter_map(|(index, line)| {
        let (key, value) = line.trim().split_once('=')?;
        (key.trim() == "firewall_backend").then(|| (index + 1, value.trim()))
    });
    let Some((line, value)) = settings.into_iter().next() else { return Ok(None) };
    let quoted = ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.split_once(quote));
    let rest_is_comment = |rest: &str| rest.trim().is_empty() || rest.trim_start().starts_with('#');
    match quoted {
        Some(("iptables", rest)) if rest_is_comment(rest) => Ok(Some(Choice::Xtables)),
        Some(("nftables", rest)) if rest_is_comment(rest) => Ok(Some(Choice::Nftables)),
        _ => Err((line, value.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_firewall_backend_of_libvirts_file_counts() {
        for (text, expected) in [
            ("", Ok(None)),
            ("#firewall_backend = \"nftables\"\nenable_trace = 0\n", Ok(None)),
            ("# x\nfirewall_backend = \"nftables\"\n", Ok(Some(Choice::Nftables))),
            ("  firewall_backend='iptables' # as ever\n", Ok(Some(Choice::Xtables))),
            ("firewall_backend = \"iptables\"\nfirewall_backend = \"nftables\"", Ok(Some(Choice::Xtables))),
            ("\nfirewall_backend = \"pf\"", Err((2, "\"pf\"".to_owned()))),
            ("firewall_backend = nftables", Err((1, "nftables".to_owned()))),
            (
                "firewall_backend = \"nftables\" \"iptables\"",
                Err((1, "\"nftables\" \"iptables\"".to_owned())),
            ),
            ("firewall_backend_x = \"pf\"", Ok(None)),
        ] {
            assert_eq!(firewall_backend(text), expected, "{text}");
        }
    }
}
