//! The builders of frames, read by a parser that is not ours.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use anyhow::{Context, Result, bail};
use etherparse::{IpNumber, NetHeaders, NetSlice, PacketHeaders, SlicedPacket, TransportSlice};
use nwfilter_testlab::frames::{self, Arp, protocol, tcp_flags};
use nwfilter_testlab::{Ends, Mac};

const A: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0a]);
const B: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0b]);

fn both() -> [Ends; 2] {
    let addr = |last| [0xfd00, 0, 0, 0, 0, 0, 0, last].into();
    [Ends::v4(A, [10, 0, 0, 1].into(), B, [10, 0, 0, 2].into()), Ends::v6(A, addr(1), B, addr(2))]
}

/// Whether the checksums of the IPv4 header and of UDP, TCP or ICMP are what etherparse computes.
fn is_intact(frame: &[u8]) -> Result<bool> {
    let packet = PacketHeaders::from_ethernet_slice(frame)?;
    let transport = packet.transport.context("no transport header")?;
    let mut computed = transport.clone();
    let payload = packet.payload.slice();
    let header_is_intact = match packet.net.context("no IP header")? {
        NetHeaders::Ipv4(ip, _) => {
            computed.update_checksum_ipv4(&ip, payload)?;
            ip.header_checksum == ip.calc_header_checksum()
        }
        NetHeaders::Ipv6(ip, _) => {
            computed.update_checksum_ipv6(&ip, payload)?;
            true
        }
        NetHeaders::Arp(_) => bail!("ARP has no checksum"),
    };
    Ok(header_is_intact && computed == transport)
}

#[test]
fn checksums_are_right_unless_they_shall_be_wrong() -> Result<()> {
    for ends in both() {
        for frame in [
            frames::udp(&ends, 1000, 53, b"odd"),
            frames::udp(&ends.reverse(), 53, 1000, b"even"),
            frames::tcp(&ends, 1000, 80, tcp_flags::SYN),
            frames::tcp_segment(&ends, (1000, 80), (7, 8), tcp_flags::PSH | tcp_flags::ACK, b"GET"),
            frames::icmp_echo(&ends, 1, 2),
            frames::icmp_echo_reply(&ends, 1, 2),
            frames::icmp(&ends, 3, 1, &[0; 5]),
        ] {
            assert!(is_intact(&frame)?, "{frame:02x?}");
            assert!(is_intact(&frames::dscp(frame.clone(), 46))?);
            assert!(!is_intact(&frames::bad_l4_checksum(frame))?);
        }
    }
    let udp = frames::udp(&both()[0], 1, 2, b"");
    assert!(!is_intact(&frames::bad_ip_checksum(udp))?);
    Ok(())
}

#[test]
fn addresses_ports_and_flags_are_where_they_belong() -> Result<()> {
    let [ends, ends6] = both();
    let frame = frames::tcp(&ends, 1000, 80, tcp_flags::SYN | tcp_flags::ACK);
    let packet = SlicedPacket::from_ethernet(&frame)?;
    let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("{packet:?}") };
    assert_eq!(ip.header().source_addr().to_string(), "10.0.0.1");
    assert_eq!(ip.header().destination_addr().to_string(), "10.0.0.2");
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("{packet:?}") };
    assert_eq!((tcp.source_port(), tcp.destination_port()), (1000, 80));
    assert_eq!((tcp.syn(), tcp.ack(), tcp.fin(), tcp.rst()), (true, true, false, false));

    let frame = frames::dscp(frames::udp(&ends6.with_src_mac(B).with_dst_mac(A), 1, 2, b""), 46);
    let packet = SlicedPacket::from_ethernet(&frame)?;
    let header = packet.link.as_ref().unwrap().to_header();
    let header = header.unwrap().ethernet2().unwrap();
    assert_eq!((header.source, header.destination), (B.octets(), A.octets()));
    let Some(NetSlice::Ipv6(ip)) = &packet.net else { panic!("{packet:?}") };
    assert_eq!(ip.header().to_header().traffic_class, 46 << 2);
    Ok(())
}

#[test]
fn fragments_hold_the_whole_packet() -> Result<()> {
    for (ends, header) in both().into_iter().zip([20, 40 + 8]) {
        let whole = frames::udp(&ends, 1, 2, &[7; 50]);
        let start = if header == 20 { 34 } else { 54 };
        let fragments = frames::fragments(&whole, 26);
        assert_eq!(fragments.len(), 3, "58 bytes as 24, 24 and 10");
        let mut payload = Vec::new();
        for (number, fragment) in fragments.iter().enumerate() {
            let packet = SlicedPacket::from_ethernet(fragment)?;
            let ip = packet.ip_payload().unwrap();
            assert!(ip.fragmented);
            assert_eq!(ip.ip_number, IpNumber::UDP);
            if let Some(NetSlice::Ipv4(ip)) = &packet.net {
                let header = ip.header().to_header();
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                assert_eq!(usize::from(header.fragment_offset.value()) * 8, payload.len());
                assert_eq!(header.more_fragments, number < 2);
            }
            assert_eq!(fragment.len(), 14 + header + ip.payload.len());
            payload.extend_from_slice(ip.payload);
        }
        assert_eq!(payload, whole[start..]);
    }
    Ok(())
}

#[test]
fn frames_below_ip_are_what_they_say() -> Result<()> {
    let [ends, _] = both();
    let tagged = frames::vlan(42, &frames::udp(&ends, 1, 2, b""));
    let packet = SlicedPacket::from_ethernet(&tagged)?;
    assert_eq!(packet.vlan_ids()[0].value(), 42);
    assert!(matches!(packet.transport, Some(TransportSlice::Udp(_))));

    let request = Arp::request(A, [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let frame = frames::arp(A, Mac::BROADCAST, request);
    let Some(NetSlice::Arp(arp)) = SlicedPacket::from_ethernet(&frame)?.net else { panic!("no ARP") };
    let eth = arp.to_packet().try_eth_ipv4().unwrap();
    assert_eq!((eth.sender_mac, eth.sender_ipv4), (A.octets(), [10, 0, 0, 1]));
    assert_eq!((eth.target_mac, eth.target_ipv4), ([0; 6], [10, 0, 0, 2]));
    assert_eq!(eth.operation.0, 1);

    let rarp = frames::rarp(A, Mac::BROADCAST, Arp::rarp_request(A));
    assert_eq!((&rarp[12..14], &rarp[20..22]), (&[0x80, 0x35][..], &[0, 3][..]));
    let stp = frames::stp(A);
    assert_eq!(usize::from(u16::from_be_bytes([stp[12], stp[13]])), stp.len() - 14);
    assert_eq!(stp[14..17], [0x42, 0x42, 0x03]);
    Ok(())
}

#[test]
fn other_protocols_have_their_numbers_and_checksums() -> Result<()> {
    let [ends, ends6] = both();
    let number = |frame: &[u8]| SlicedPacket::from_ethernet(frame).unwrap().ip_payload().unwrap().ip_number.0;
    assert_eq!(number(&frames::sctp(&ends, 1, 2)), protocol::SCTP);
    assert_eq!(number(&frames::sctp(&ends6, 1, 2)), protocol::SCTP);
    assert_eq!(number(&frames::igmp(&ends, [224, 0, 0, 1].into())), protocol::IGMP);
    assert_eq!(number(&frames::ip(&ends6, protocol::UDPLITE, &[0; 8])), protocol::UDPLITE);
    // The report of 224.0.0.1: 0x1600 + 0xe000 + 0x0001 = 0xf601, whose complement is 0x09fe.
    assert_eq!(frames::igmp(&ends, [224, 0, 0, 1].into())[36..38], [0x09, 0xfe]);
    Ok(())
}

#[test]
fn a_mac_address_is_read_and_written() -> Result<()> {
    assert_eq!("52:54:00:00:00:0A".parse::<Mac>()?, A);
    assert_eq!(A.to_string(), "52:54:00:00:00:0a");
    for bad in ["", "52:54:00:00:00", "52:54:00:00:00:0a:0b", "52:54:00:00:00:xy", "52:54:00:00:00:100"] {
        assert!(bad.parse::<Mac>().is_err(), "{bad}");
    }
    Ok(())
}
