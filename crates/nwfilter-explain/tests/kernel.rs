//! What is explained is what the kernel does: the same frames pass on paper and through ebtables and iptables.

mod support;

use anyhow::Result;
use nwfilter_testlab::{Need, skip_unless};
use nwfilter_xtables::{Settings, Xtables};
use support::{Lab, compare, is_known, trees};

/// How many generated trees are tried.
const GENERATED: usize = 150;

#[test]
fn explained_frames_pass_and_stop_as_the_kernel_lets_them() -> Result<()> {
    skip_unless!(
        Need::Root,
        Need::Tool("ip"),
        Need::Tool("ipset"),
        Need::Tool("conntrack"),
        Need::Tool("ebtables"),
        Need::Tool("iptables")
    );
    let lab = Lab::new(Xtables::new(Settings::default()), true)?;
    compare(&lab, trees(GENERATED), |ruleset| ruleset, is_known)
}
