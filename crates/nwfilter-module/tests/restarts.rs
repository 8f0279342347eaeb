//! What a restart, a crash and a change of the module do to domains that run: nothing.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nwfilter_testlab::{Connect, Host, Libvirtd, LibvirtdOptions, Need, Saved, skip_unless};

use common::traffic::while_sending;
use common::{Domain, Module, install, libvirtd};

/// The handles of all rules, which the kernel gives anew to every rule that is written.
fn handles(host: &Host) -> Result<String> {
    let mut all = String::new();
    for family in ["bridge", "ip", "ip6"] {
        all += &host.run(&["nft", "--handle", "--stateless", "list", "ruleset", family])?;
    }
    Ok(all)
}

/// The rules in a port's own chains, without those that lead there.
fn chains(saved: &Saved, port: &str) -> Vec<String> {
    let leads =
        |line: &&str| ["-A PREROUTING", "-A POSTROUTING", "-A nwfilter-"].iter().any(|p| line.starts_with(p));
    let ebtables = saved.port(port).ebtables;
    ebtables.lines().filter(|line| !leads(line)).map(str::to_owned).collect()
}

fn start_all(daemon: &Libvirtd, count: u8) -> Result<Vec<Domain>> {
    let domains: Vec<_> = (1..=count).map(Domain::clean).collect();
    domains.iter().try_for_each(|domain| domain.start(daemon))?;
    Ok(domains)
}

fn ports(daemon: &Libvirtd) -> Result<BTreeMap<String, String>> {
    let list = daemon.virsh(&["nwfilter-binding-list"])?;
    let row = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some((words.next()?, words.next()?))
    };
    Ok(list.lines().filter_map(row).collect())
}

#[test]
fn a_crash_or_a_restart_with_twenty_domains_leaves_every_port_as_it_is_and_serves_at_once() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu, Need::Tool("nft"));
    let host = Host::new()?;
    let (_dir, mut daemon) = libvirtd(&host, Module::Ours)?;
    let probe = host.tap("probe")?;
    let domains = start_all(&daemon, 20)?;
    let (rules, saved, bindings) = (handles(&host)?, host.saved()?, ports(&daemon)?);
    assert_eq!(bindings.len(), 20);

    let mut served = Vec::new();
    let traffic = while_sending(&host, &probe, &domains[7], || {
        for crash in [true, false] {
            if crash {
                daemon.kill()?
            } else {
                daemon.stop()?;
                // libvirt's own module could take over here: it cannot delete what a tree refers to.
                assert!(!host.saved()?.ebtables.contains("nwfilter-in"));
            }
            for port in bindings.keys() {
                assert_eq!(chains(&host.saved()?, port), chains(&saved, port));
            }
            let begin = Instant::now();
            daemon.start_again()?;
            assert_eq!(ports(&daemon)?, bindings);
            served.push(begin.elapsed());
            if crash {
                assert_eq!(handles(&host)?, rules, "a rule was written");
            }
            assert_eq!(saved.diff(&host.saved()?), None);
            for domain in &domains {
                common::eventually("every domain is known again", Duration::from_secs(30), || {
                    Ok(domain.is_running(&daemon))
                })?;
            }
        }
        Ok(())
    })?;
    eprintln!("served after {served:?}; {traffic:?}");
    assert_eq!((traffic.arrived, traffic.leaked), (traffic.rounds, 0));
    ensure!(served.iter().all(|time| *time < Duration::from_secs(10)), "{served:?}");

    domains.iter().try_for_each(|domain| domain.destroy(&daemon))?;
    assert_eq!(ports(&daemon)?.len(), 0);
    assert!(!host.saved()?.ebtables.contains("tap"));
    Ok(())
}

#[test]
fn what_was_lost_while_the_daemon_was_down_is_back_when_it_serves() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, mut daemon) = libvirtd(&host, Module::Ours)?;
    let domains = start_all(&daemon, 3)?;
    let before = host.saved()?;
    daemon.stop()?;
    host.run(&["ebtables", "-t", "nat", "-F"])?;
    daemon.start_again()?;
    daemon.virsh(&["nwfilter-binding-list"])?;
    assert_eq!(before.diff(&host.saved()?), None);
    domains.iter().try_for_each(|domain| domain.destroy(&daemon))?;
    Ok(())
}

#[test]
fn a_hangup_has_files_read_that_were_edited_by_hand() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    let _tap = host.tap("tap0")?;
    let filter = |port| {
        format!(
            "<filter name='f'><rule action='accept' direction='in'><tcp dstportstart='{port}'/></rule></filter>"
        )
    };
    daemon.define(&filter(80))?;
    daemon.bind(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:00:00:01'/><filterref filter='f'/></filterbinding>",
    )?;
    daemon.write_file("/etc/libvirt/nwfilter/f.xml", &filter(443))?;
    assert!(host.saved()?.iptables.contains("--dport 80"));
    let pid = daemon.pid().context("it runs")?.to_string();
    host.run(&["kill", "-HUP", &pid])?;
    common::eventually("the edited filter is in force", Duration::from_secs(30), || {
        Ok(host.saved()?.iptables.contains("--dport 443"))
    })
}

#[test]
fn a_filter_whose_file_is_damaged_serves_new_ports_after_a_hangup_as_with_libvirts_module() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    for module in [Module::Libvirts, Module::Ours] {
        let host = Host::new()?;
        let (_dir, daemon) = libvirtd(&host, module)?;
        let _tap = host.tap("tap0")?;
        daemon.define(
            "<filter name='f'><rule action='accept' direction='in'><tcp dstportstart='80'/></rule></filter>",
        )?;
        daemon.write_file("/etc/libvirt/nwfilter/f.xml", "<filter name='f'><rule")?;
        let pid = daemon.pid().context("it runs")?.to_string();
        host.run(&["kill", "-HUP", &pid])?;
        common::eventually("the damaged file is in the log", Duration::from_secs(30), || {
            let log = daemon.log();
            Ok(log.contains("nwfilter/f.xml is damaged")
                || log.contains("Couldn't find end of Start Tag rule"))
        })?;
        daemon.bind(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='tap0'/><mac address='52:54:00:00:00:01'/><filterref filter='f'/></filterbinding>",
        )?;
        ensure!(host.saved()?.iptables.contains("--dport 80"), "with {module:?}");
    }
    Ok(())
}

#[test]
fn what_others_flush_under_a_running_daemon_is_back_at_once() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (_dir, daemon) = libvirtd(&host, Module::Ours)?;
    daemon.define(
        "<filter name='web'><filterref filter='clean-traffic'/>
         <rule action='accept' direction='in'><tcp dstportstart='80'/></rule></filter>",
    )?;
    let domain = Domain::new(1, Some("web"));
    domain.start(&daemon)?;
    let before = host.saved()?;
    assert!(before.port("tap1").iptables.contains("--dport 80"), "{before:?}");
    for flush in ["iptables -F", "ebtables -t nat -F"] {
        let mut process = host.spawn(&flush.split(' ').collect::<Vec<_>>())?;
        ensure!(process.wait(Duration::from_secs(30))?.success(), "{}", process.log());
        let said = format!("(process {}) changed", process.pid());
        common::eventually(flush, Duration::from_secs(30), || {
            Ok(before.diff(&host.saved()?).is_none() && daemon.log().contains(&said))
        })?;
    }
    domain.destroy(&daemon)
}

#[test]
fn the_modules_are_exchanged_both_ways_under_running_domains() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    let host = Host::new()?;
    let (dir, mut daemon) = libvirtd(&host, Module::Libvirts)?;
    let probe = host.tap("probe")?;
    let domains = start_all(&daemon, 2)?;
    let before = host.saved()?;
    let mut bindings = Vec::new();

    for module in [Module::Ours, Module::Libvirts, Module::Ours] {
        let traffic = while_sending(&host, &probe, &domains[0], || {
            daemon.stop()?;
            install(&dir, module)?;
            daemon.start_again()?;
            let document = daemon.binding_dumpxml("tap1")?;
            // Newer versions say what a binding's rules were made with.
            let lines = document.lines().filter(|line| !line.contains("<backend ")).map(str::to_owned);
            bindings.push((ports(&daemon)?, lines.collect::<Vec<_>>()));
            // The order of the ports is by chance in libvirt's module.
            let saved = host.saved()?;
            for port in domains.iter().map(Domain::port) {
                assert_eq!(before.port(&port).diff(&saved.port(&port)), None, "with {module:?}");
            }
            common::eventually("the domain is known again", Duration::from_secs(30), || {
                Ok(domains[1].is_running(&daemon))
            })
        })?;
        eprintln!("{module:?}: {traffic:?}");
        assert_eq!(traffic.leaked, 0, "with {module:?}: {traffic:?}");
        assert_eq!(traffic.arrived, traffic.rounds, "with {module:?}: {traffic:?}");
    }
    assert!(bindings.iter().all(|seen| *seen == bindings[0]), "{bindings:?}");

    // What the other module made is this one's: a redefinition reaches it, an end removes it.
    daemon.define("<filter name='clean-traffic'><rule action='drop' direction='inout'/></filter>")?;
    assert_eq!(host.saved()?.port("tap1").ebtables.matches("-j DROP").count(), 2);
    domains.iter().try_for_each(|domain| domain.destroy(&daemon))?;
    assert!(!host.saved()?.ebtables.contains("tap1"));
    assert_eq!(daemon.virsh_on(Connect::Qemu, &["list", "--name"])?.trim(), "");
    Ok(())
}

#[test]
fn a_daemon_that_ends_when_idle_stays_while_a_port_is_bound() -> Result<()> {
    skip_unless!(Need::Root, Need::Libvirtd, Need::Qemu);
    const IDLE: u32 = 2;
    let (host, dir) = (Host::new()?, common::driver_dir(Module::Ours)?);
    let idle = LibvirtdOptions { idle_timeout: Some(IDLE), ..common::options(&dir) };
    let mut daemon = Libvirtd::start_with(&host, idle)?;
    let tap = host.tap("tap0")?;
    daemon.bind(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
         <portdev name='tap0'/><mac address='52:54:00:00:00:01'/>
         <filterref filter='no-ip-multicast'/></filterbinding>",
    )?;
    std::thread::sleep(Duration::from_secs(3 * u64::from(IDLE)));
    ensure!(!daemon.has_ended()?, "the daemon has left a port that it filters");
    // It repairs what others change, which is what it has to stay for.
    host.run(&["ebtables", "-t", "nat", "-F"])?;
    common::eventually("the rules are back", Duration::from_secs(30), || {
        Ok(host.saved()?.ebtables.contains("libvirt-O-tap0")
            || host.saved()?.ebtables.contains("libvirt-I-tap0"))
    })?;
    drop(tap);
    daemon.unbind("tap0")?;
    common::eventually("the daemon ends", Duration::from_secs(30), || daemon.has_ended())
}
