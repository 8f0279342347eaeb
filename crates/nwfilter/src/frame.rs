//! Packets of which the kernel tells the beginning.

use nwfilter_explain::Packet;

/// The packet of a frame's Ethernet header and the beginning of the rest; zeros stand for what is not known. `None` if that is
/// no frame.
pub(crate) fn begun(link: &[u8], rest: &[u8]) -> Option<Packet> {
    let number = |at: usize| {
        let pair = rest.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([pair[0], pair[1]])))
    };
    let length = match link.last_chunk() {
        Some([0x08, 0x00]) => number(2),
        Some([0x86, 0xdd]) => number(4).map(|payload| payload + 40),
        _ => None,
    };
    let mut frame = [link, rest].concat();
    let whole = length.map_or(frame.len(), |length| link.len() + length);
    frame.resize(whole.max(frame.len()), 0);
    Packet::parse(&frame).ok()
}
