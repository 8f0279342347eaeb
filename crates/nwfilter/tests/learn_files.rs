//! The files of learned addresses and leases, whatever somebody wrote into them: no kernel, no root.

#![allow(clippy::unwrap_used)] // The lint does not see that the helpers are tests.

mod learn_support;

use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;

use anyhow::Result;
use learn_support::*;
use nix::sys::stat::Mode;
use nwfilter::xml::{read_binding, write_binding_status};
use nwfilter::{BindingState, Config, Driver, with_causes};
use nwfilter_testlab::port_dev;
use nwfilter_xtables::Xtables;

const DHCP: (&str, &str) = ("CTRL_IP_LEARNING", "dhcp");

/// Directories with one binding, and these files of the state directory.
fn state(dir: &Path, params: &[(&str, &str)], files: &[(&str, &str)]) -> Result<Config> {
    let config = Config::new(dir.join("filters"), dir.join("state"));
    fs::create_dir_all(&config.state_dir)?;
    let binding = read_binding("b.xml", &binding("tap0", "clean-traffic", GUEST, params)).into_result()?;
    fs::write(config.state_dir.join("tap0.xml"), write_binding_status(&binding))?;
    for (name, text) in files {
        fs::write(config.state_dir.join(name), text)?;
    }
    Ok(config)
}

fn guest() -> String {
    format!("d54df46f-1ab5-4a22-8618-4560ef5fac2c-{GUEST}")
}

#[test]
fn a_lease_of_an_address_that_no_host_can_have_is_refused_when_it_is_read() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let line = |address: &str| format!("18446744073709551615 {} {address} 10.0.0.1\n", guest());
    let lines: String =
        ["0.0.0.0", "10.0.0.2", "255.255.255.255", "127.0.0.1", "224.0.0.1", "fe80::2"].map(line).concat();
    let config = state(dir.path(), &[DHCP], &[("nwfilter.leases", &lines)])?;
    let driver = Driver::open(config, Xtables::default())?;
    assert_eq!(addresses_of(&driver.binding_state(&port_dev("tap0"))?), ["10.0.0.2"]);
    Ok(())
}

#[test]
fn a_learned_address_that_no_host_can_have_is_refused_when_it_is_read() -> Result<()> {
    for address in ["0.0.0.0", "255.255.255.255", "127.0.0.1"] {
        let dir = tempfile::tempdir()?;
        let line = format!("tap0 {} arp {address}\n", guest());
        let driver = Driver::open(state(dir.path(), &[], &[("learned", &line)])?, Xtables::default())?;
        let state = driver.binding_state(&port_dev("tap0"))?;
        assert!(matches!(state, BindingState::Unattended { .. }), "{address}: {state}");
    }
    Ok(())
}

#[test]
fn a_pipe_in_place_of_a_file_is_an_error_and_hangs_nobody() -> Result<()> {
    for name in ["nwfilter.leases", "nwfilter.leases6", "learned"] {
        let dir = tempfile::tempdir()?;
        let config = state(dir.path(), &[DHCP], &[])?;
        nix::unistd::mkfifo(&config.state_dir.join(name), Mode::S_IRUSR | Mode::S_IWUSR)?;
        let (sender, opened) = channel();
        std::thread::spawn(move || {
            let error = Driver::open(config, Xtables::default()).map(drop).map_err(|e| with_causes(&e));
            sender.send(error)
        });
        let error = opened.recv_timeout(SOON)?.unwrap_err();
        assert!(error.contains(&format!("{name}: not a regular file")), "{error}");
    }
    Ok(())
}
