//! Real QEMU domains whose interfaces have filters, in a live libvirtd with our module.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nwfilter_testlab::{
    Connect, Ends, Host, Injector, Libvirtd, LibvirtdOptions, Need, Saved, Tap, frames, skip_unless,
};

use common::traffic::while_sending;
use common::{Domain, Module, driver_dir, eventually, interface, libvirtd, options, with_xml};

/// The frames of a domain and what becomes of them.
struct Wire {
    probe: Tap,
}

impl Wire {
    fn new(host: &Host) -> Result<Self> {
        Ok(Self { probe: host.tap("probe")? })
    }

    /// Whether a frame that the domain sends with this address gets out of its port.
    fn lets_out(&self, injector: &Injector, domain: &Domain, address: &str) -> Result<bool> {
        self.probe.drain()?;
        let to = "52:54:00:00:00:fe".parse()?;
        let ends = Ends::v4(domain.mac(), address.parse()?, to, "10.0.0.254".parse()?);
        let frame = frames::udp(&ends, 1000, 2000, b"from the guest");
        injector.send(&frame)?;
        Ok(self.probe.expect(Duration::from_millis(200), |seen| seen == frame)?.is_some())
    }
}

#[test]
fn a_domain_with_a_filterref_gets_the_chains_that_libvirts_module_makes_and_loses_them_with_its_end()
-> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let domain = Domain::clean(1);
    let chains = |module| -> Result<Saved> {
        let host = Host::new()?;
        let (_dir, daemon) = libvirtd(&host, module)?;
        let before = host.saved()?;
        domain.start(&daemon)?;
        let saved = host.saved()?;
        domain.destroy(&daemon)?;
        assert_eq!(host.saved()?.port(&domain.port()), Saved::default());
        assert_eq!(daemon.virsh(&["nwfilter-binding-list"])?.trim(), "");
        assert_eq!(before, Saved::default());
        Ok(saved)
    };
    let (libvirts, ours) = (chains(Module::Libvirts)?, chains(Module::Ours)?);
    assert_eq!(libvirts.diff(&ours), None);
    assert!(ours.ebtables.contains("libvirt-I-tap1"));
    Ok(())
}

#[test]
fn what_a_running_domain_sends_is_filtered() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let wire = Wire::new(&host)?;
    let (filtered, free) = (Domain::clean(1), Domain::new(2, None));
    filtered.start(&daemon)?;
    free.start(&daemon)?;
    let injector = Injector::open(&host, "tap1")?;
    assert!(wire.lets_out(&injector, &filtered, "10.0.0.1")?);
    assert!(!wire.lets_out(&injector, &filtered, "10.0.0.66")?);
    let injector = Injector::open(&host, "tap2")?;
    assert!(wire.lets_out(&injector, &free, "10.0.0.66")?);
    Ok(())
}

#[test]
fn the_address_that_a_running_domain_uses_is_learned_and_kept_across_a_restart() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, mut daemon) = libvirtd(&host, Module::Ours)?;
    let wire = Wire::new(&host)?;
    let domain = Domain { filterref: "<filterref filter='clean-traffic'/>".into(), ..Domain::new(1, None) };
    domain.start(&daemon)?;
    let injector = Injector::open(&host, "tap1")?;
    assert!(wire.lets_out(&injector, &domain, "10.0.0.7")?, "any address passes until one is known");
    eventually("what was learned is enforced", Duration::from_secs(5), || {
        Ok(!wire.lets_out(&injector, &domain, "10.0.0.8")?)
    })?;
    assert!(wire.lets_out(&injector, &domain, "10.0.0.7")?);
    daemon.restart()?;
    assert!(wire.lets_out(&injector, &domain, "10.0.0.7")?);
    assert!(!wire.lets_out(&injector, &domain, "10.0.0.8")?);
    Ok(())
}

#[test]
fn a_domain_that_cannot_be_filtered_does_not_start_and_leaves_nothing() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    daemon.define(
        "<filter name='needs'><rule action='drop' direction='in'><ip srcipaddr='$SERVER'/></rule></filter>",
    )?;
    // The kernel has no set of that name, which only it can know.
    daemon.define(
        "<filter name='set'><rule action='accept' direction='in'>
           <all ipset='nwf-not-there' ipsetflags='src'/></rule></filter>",
    )?;
    for (filter, why) in [
        ("nothere", "no filter is named 'nothere'"),
        ("needs", "no value for SERVER"),
        ("set", "nwf-not-there"),
    ] {
        fails_and_leaves_nothing(&host, &daemon, &Domain::new(1, Some(filter)), why)?;
    }
    Ok(())
}

#[test]
fn without_the_tools_a_domain_with_a_filter_does_not_start() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let dir = driver_dir(Module::Ours)?;
    // No program can be run whose place is taken by a file that is none.
    let nothing = tempfile::NamedTempFile::new()?;
    let tools = ["iptables", "ip6tables", "ebtables"].map(|tool| {
        let tools = ["", "-save", "-restore"].map(|part| format!("/usr/sbin/{tool}{part}"));
        tools.into_iter().filter_map(|tool| std::fs::canonicalize(tool).ok())
    });
    let tools: BTreeSet<_> = tools.into_iter().flatten().collect();
    let mounts = tools.into_iter().map(|tool| (nothing.path().to_owned(), tool)).collect();
    let daemon = Libvirtd::start_with(&host, LibvirtdOptions { mounts, ..options(&dir) })
        .context("libvirtd without the tools")?;
    fails_and_leaves_nothing(&host, &daemon, &Domain::clean(1), "iptables")
}

fn fails_and_leaves_nothing(host: &Host, daemon: &Libvirtd, domain: &Domain, why: &str) -> Result<()> {
    let error = domain.start(daemon).err().context("the domain started")?;
    ensure!(format!("{error:#}").contains(why), "{error:#}");
    assert_eq!(host.saved()?.port(&domain.port()), Saved::default());
    assert!(host.run(&["ip", "link", "show", &domain.port()]).is_err());
    let bindings = daemon.path("/run/libvirt/nwfilter-binding")?;
    let files: Vec<_> = std::fs::read_dir(bindings).into_iter().flatten().flatten().collect();
    assert!(files.iter().all(|file| !file.path().to_string_lossy().ends_with(".xml")), "{files:?}");
    assert_eq!(daemon.virsh_on(Connect::Qemu, &["list", "--all", "--name"])?.trim(), "");
    Ok(())
}

#[test]
fn an_interface_is_filtered_from_its_hot_plug_to_its_unplug() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let wire = Wire::new(&host)?;
    let (domain, second) = (Domain::clean(1), Domain::clean(2));
    domain.start(&daemon)?;
    let first_port = host.saved()?;

    with_xml(&daemon, &["attach-device", "vm1"], &second.interface())?;
    let injector = Injector::open(&host, "tap2")?;
    assert!(wire.lets_out(&injector, &second, "10.0.0.2")?);
    assert!(!wire.lets_out(&injector, &second, "10.0.0.66")?);
    drop(injector);

    let bad = interface(second.mac(), "tap3", "<filterref filter='nothere'/>");
    assert!(with_xml(&daemon, &["attach-device", "vm1"], &bad).is_err());
    assert!(host.run(&["ip", "link", "show", "tap3"]).is_err());

    // Firmware does not answer an unplug request, so the filter stays as long as the interface.
    with_xml(&daemon, &["detach-device", "vm1"], &second.interface())?;
    assert!(host.saved()?.port("tap2") != Saved::default());
    domain.destroy(&daemon)?;
    assert_eq!(host.saved()?.port("tap1"), Saved::default());
    assert_eq!(host.saved()?.port("tap2"), Saved::default());
    assert!(first_port.port("tap1") != Saved::default());
    Ok(())
}

#[test]
fn the_filter_of_a_running_domain_is_exchanged_with_update_device() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let wire = Wire::new(&host)?;
    daemon.define("<filter name='also-clean'><filterref filter='clean-traffic'/></filter>")?;
    daemon.define("<filter name='no-udp'><rule action='drop' direction='out'><udp/></rule></filter>")?;
    let (clean, no_udp) = (Domain::clean(1), Domain::new(1, Some("no-udp")));
    clean.start(&daemon)?;
    let injector = Injector::open(&host, "tap1")?;
    assert!(wire.lets_out(&injector, &clean, "10.0.0.1")?);

    let also_clean = Domain::new(1, Some("also-clean"));
    let traffic = while_sending(&host, &wire.probe, &clean, || {
        for domain in [&also_clean, &clean, &also_clean, &clean] {
            with_xml(&daemon, &["update-device", "vm1"], &domain.interface())?;
        }
        Ok(())
    })?;
    assert_eq!((traffic.arrived, traffic.leaked), (traffic.rounds, 0));

    with_xml(&daemon, &["update-device", "vm1"], &no_udp.interface())?;
    assert!(!wire.lets_out(&injector, &clean, "10.0.0.1")?);
    assert!(!host.saved()?.ebtables.contains("tap1"));

    let missing = Domain::new(1, Some("nothere"));
    assert!(with_xml(&daemon, &["update-device", "vm1"], &missing.interface()).is_err());
    assert!(!wire.lets_out(&injector, &clean, "10.0.0.1")?, "the filter is not the old one after a refusal");
    Ok(())
}

#[test]
fn twenty_domains_started_at_once_are_all_filtered() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let domains: Vec<_> = (1..=20).map(Domain::clean).collect();
    let begin = Instant::now();
    let started: Vec<_> = std::thread::scope(|scope| {
        let daemon = &daemon;
        let threads: Vec<_> = domains.iter().map(|domain| scope.spawn(|| domain.start(daemon))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    eprintln!("20 domains started in {:?}", begin.elapsed());
    started.into_iter().collect::<Result<Vec<_>>>()?;
    let saved = host.saved()?;
    for domain in &domains {
        assert!(domain.is_running(&daemon));
        assert!(saved.port(&domain.port()).ebtables.contains(&domain.mac().to_string()));
    }
    assert_eq!(
        daemon.virsh(&["nwfilter-binding-list"])?.lines().filter(|line| line.contains("clean")).count(),
        20
    );
    Ok(())
}

#[test]
fn the_manuals_ftp_filters_let_an_ftp_server_work_and_nothing_else_through() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("vsftpd"), Need::Tool("curl"));
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let mac = "52:54:00:7b:35:93";
    let server = host.guest("vnet0", mac.parse()?).addr("10.0.0.2/24").start()?;
    let client = host.guest("vnet1", "52:54:00:00:00:01".parse()?).addr("10.0.0.1/24").start()?;
    let files = tempfile::tempdir()?;
    std::fs::write(files.path().join("file"), "some content")?;
    let _ftp = server.vsftpd(files.path())?;
    let _other = server.tcp_service(8000, "something else")?;

    for (name, filter) in [
        ("ftp-by-port", include_str!("../../../xml-fixtures/seed/ftp-by-port.xml")),
        ("ftp-by-state", include_str!("../../../xml-fixtures/seed/ftp-by-state.xml")),
    ] {
        daemon.define(filter)?;
        daemon.bind(&format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='vnet0'/><mac address='{mac}'/>
             <filterref filter='{name}'><parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
        ))?;
        let curl = ["curl", "-sS", "--max-time", "10", "--ftp-port", "-", "ftp://10.0.0.2/file"];
        assert_eq!(client.run(&curl)?, "some content", "{name}");
        assert!(client.tcp_fetch("10.0.0.2:8000", Duration::from_secs(1)).is_err(), "{name}");
        daemon.unbind("vnet0")?;
    }
    Ok(())
}

#[test]
fn the_tags_of_a_domain_come_with_its_filterref_and_not_with_its_metadata() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let mut domain = Domain::clean(1);
    let parameter = "<parameter name='CTRL_TAGS' value='front'/></filterref>";
    domain.filterref = domain.filterref.replace("</filterref>", parameter);
    let namespace = nwfilter_xml::METADATA_NAMESPACE;
    let metadata = format!(
        "</name><metadata><n:filterrefs xmlns:n='{namespace}'><n:tag name='web'/></n:filterrefs></metadata>"
    );
    with_xml(&daemon, &["create"], &domain.xml().replace("</name>", &metadata))?;
    let binding = daemon.virsh(&["nwfilter-binding-dumpxml", "tap1"])?;
    assert!(binding.contains("name='CTRL_TAGS' value='front'"), "{binding}");
    assert!(
        !binding.contains("web"),
        "libvirt passes metadata now: docs/sets.md says that it does not\n{binding}"
    );
    Ok(())
}
