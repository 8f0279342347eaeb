//! What becomes of ports whose interfaces come, go, or are in no bridge.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod driver_support;

use driver_support::Lab;
use nwfilter::{Attachment, Fake};
use nwfilter_testlab::{Need, skip_unless};

#[test]
fn the_status_of_a_port_says_whether_packets_get_to_its_rules() {
    skip_unless!(Need::Root);
    let (lab, fake) = (Lab::new(1), Fake::new());
    lab.host.ip(&["tuntap add dev p1 mode tap"]).unwrap();
    for port in ["p0", "p1", "p2"] {
        lab.write_binding(port, "allow-arp");
    }
    let driver = lab.fake_driver(&fake);
    let attachments = || {
        let statuses = lab.host.enter(|| driver.port_statuses()).unwrap();
        statuses.into_iter().map(|status| status.attachment).collect::<Vec<_>>()
    };
    use Attachment::{Absent, Bridged, Unbridged};
    assert_eq!(attachments(), [Bridged, Unbridged, Absent]);
    lab.host.ip(&["link set p1 master br0", "link del p0", "tuntap add dev p2 mode tap"]).unwrap();
    assert_eq!(attachments(), [Absent, Bridged, Unbridged]);
}
