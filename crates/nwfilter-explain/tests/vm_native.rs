//! What is explained is what the native backend does.

mod support;

use anyhow::Result;
use nwfilter_nftables::Nftables;
use nwfilter_testlab::conformance::stateless;
use nwfilter_testlab::{Need, requirements, skip_unless};
use support::{Lab, compare, is_known, trees};

/// How many generated trees are tried.
const GENERATED: usize = 20;

/// With rules on connections where the kernel follows those of a bridge, as in the virtual machine, else without.
#[test]
fn explained_frames_pass_and_stop_as_the_native_backend_lets_them() -> Result<()> {
    skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("ipset"), Need::Tool("conntrack"));
    let lab = Lab::new(Nftables::new(), false)?;
    let follows = requirements(&[Need::BridgeConntrack]).is_ok();
    let part = |ruleset| if follows { ruleset } else { stateless(ruleset) };
    // ebtables' match, which is explained, looks for the fields of spanning tree one byte before they are.
    compare(&lab, trees(GENERATED), part, |ruleset, frame| frame == "STP" || is_known(ruleset, frame))
}
