//! What is in which package.

/// A package, of either kind.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    /// Paragraphs of lines of no more than 78 characters.
    pub(super) description: &'static str,
    pub(super) files: &'static [Item],
    /// Beside the libraries, which are found in the programs.
    pub(super) deb: Relations,
    pub(super) rpm: Relations,
    /// Its scripts, by the name that Debian gives them.
    pub(super) deb_scripts: &'static [(&'static str, &'static str)],
    /// Sections of a spec file.
    pub(super) rpm_scripts: &'static str,
    /// Where what is its own is explained to users.
    pub(super) service: Option<&'static str>,
}

/// Other packages.
#[derive(Debug)]
pub(super) struct Relations {
    pub(super) requires: &'static [&'static str],
    pub(super) recommends: &'static [&'static str],
    pub(super) conflicts: &'static [&'static str],
}

/// Something that a package installs.
#[derive(Debug)]
pub(super) enum Item {
    /// A program in /usr/bin.
    Program(&'static str),
    /// A program that only other programs run, under its name in the package.
    Helper { built: &'static str, name: &'static str },
    /// The module, in the place of libvirt's.
    Module,
    /// A unit of systemd, from dist/.
    Unit(&'static str),
    /// A file of settings, from dist/.
    Setting { from: &'static str, to: &'static str },
    /// The manual pages and completions of nwfilterctl, but for the page of the listener.
    Manuals,
    /// One manual page.
    Page(&'static str),
    /// README.md, docs/ and the dashboard for Grafana.
    Documents,
    /// A program that scripts of an RPM package run, from dist/rpm/.
    RpmHelper(&'static str),
    /// A symbolic link to a helper.
    Hook(&'static str),
}

use Item::{Documents, Helper, Hook, Manuals, Module, Page, Program, RpmHelper, Setting, Unit};

pub(super) const PACKAGES: [Package; 4] = [
    Package {
        name: "nwfilter",
        summary: "network filters of virtual machines, as libvirt's nwfilter has them",
        description: "nwfilter reads libvirt's nwfilter XML unchanged and enforces it on the tap\n\
                      devices of guests, in one transaction instead of a process for each rule.\n\
                      Rules go to iptables, ip6tables and ebtables, or to one nftables table.\n\
                      \n\
                      This package has the command line, its manual pages, and a service that\n\
                      repairs what other programs change, for hosts without libvirt.",
        files: &[
            Program("nwfilterctl"),
            Unit("nwfilter.service"),
            Setting { from: "nwfilter.toml", to: "etc/nwfilter/nwfilter.toml" },
            Manuals,
            Documents,
        ],
        deb: Relations {
            requires: &["iptables", "ebtables", "kmod"],
            recommends: &["nftables"],
            conflicts: &[],
        },
        rpm: Relations {
            requires: &["iptables-nft", "ebtables", "kmod"],
            recommends: &["nftables"],
            conflicts: &[],
        },
        deb_scripts: &[
            ("prerm", include_str!("../../../dist/deb/nwfilter.prerm")),
            ("postrm", include_str!("../../../dist/deb/nwfilter.postrm")),
        ],
        rpm_scripts: "",
        service: Some("nwfilter.service"),
    },
    Package {
        name: "nwfilter-listen",
        summary: "network filters for the guests of a libvirt without nwfilter driver",
        description: "A service that follows the events of libvirt, filters guests when they start\n\
                      and keeps ports closed that have no filter yet. It is for hosts whose\n\
                      libvirt has no nwfilter driver of its own.",
        files: &[
            Program("nwfilterctl-listen"),
            Unit("nwfilter-listen.service"),
            Page("nwfilterctl-listen.8"),
        ],
        deb: Relations {
            requires: &["nwfilter (= ${version})", "nftables"],
            recommends: &["libvirt-daemon"],
            conflicts: &[],
        },
        rpm: Relations {
            requires: &["nwfilter = ${version}", "nftables"],
            recommends: &["libvirt-daemon"],
            conflicts: &[],
        },
        deb_scripts: &[],
        rpm_scripts: "",
        service: Some("nwfilter-listen.service"),
    },
    Package {
        name: "libvirt-driver-nwfilter-rs",
        summary: "nwfilter driver for libvirt that applies filters in one transaction",
        description: "A module that libvirtd, or virtnwfilterd, loads in the place of libvirt's own\n\
                      nwfilter driver. Domain XML, filters and virsh go on as before. libvirt's own\n\
                      module is kept beside it, and comes back when this package is removed.",
        files: &[Module, RpmHelper("divert-module")],
        deb: Relations {
            requires: &["iptables", "ebtables", "kmod", "libvirt-daemon (>= 9.0.0)"],
            recommends: &["nwfilter"],
            conflicts: &["nwfilter-listen", "nwfilter-hook"],
        },
        rpm: Relations {
            requires: &["iptables-nft", "ebtables", "kmod", "libvirt-daemon-driver-nwfilter >= 9.0.0"],
            recommends: &["nwfilter"],
            conflicts: &["nwfilter-listen", "nwfilter-hook"],
        },
        deb_scripts: &[
            ("preinst", include_str!("../../../dist/deb/libvirt-driver-nwfilter-rs.preinst")),
            ("postinst", include_str!("../../../dist/deb/libvirt-driver-nwfilter-rs.postinst")),
            ("postrm", include_str!("../../../dist/deb/libvirt-driver-nwfilter-rs.postrm")),
        ],
        rpm_scripts: include_str!("../../../dist/rpm/libvirt-driver-nwfilter-rs.scripts"),
        service: None,
    },
    Package {
        name: "nwfilter-hook",
        summary: "network filters for guests by libvirt's hooks",
        description: "A hook that libvirt runs before a guest starts: it filters the guest, or keeps\n\
                      it from starting. It is for hosts whose libvirt has no nwfilter driver of its\n\
                      own, and takes effect when the libvirt daemon starts the next time.",
        files: &[
            Helper { built: "domain-start-hook", name: "nwfilter-hook" },
            Hook("etc/libvirt/hooks/qemu.d/nwfilter"),
            Hook("etc/libvirt/hooks/lxc.d/nwfilter"),
        ],
        deb: Relations {
            requires: &["nwfilter (= ${version})"],
            recommends: &["libvirt-daemon"],
            conflicts: &[],
        },
        rpm: Relations {
            requires: &["nwfilter = ${version}"],
            recommends: &["libvirt-daemon"],
            conflicts: &[],
        },
        deb_scripts: &[],
        rpm_scripts: "",
        service: None,
    },
];
