//! Reads frames from a capture file of `tcpdump -w`.

/// Why a capture file cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCapture {
    /// It does not start with the magic number of a capture.
    #[error("this is no capture: expected what 'tcpdump -i PORT -w FILE' writes (pcap, not pcapng)")]
    Format,
    /// Its link type is not Ethernet.
    #[error(
        "the frames of this capture are not Ethernet frames but of link type {0}: capture on the port itself"
    )]
    LinkType(u32),
    /// A frame is truncated.
    #[error("frame {0} is cut off: capture whole frames, as 'tcpdump -s 0' does")]
    Cut(usize),
}

/// The frames of a capture.
pub fn frames(capture: &[u8]) -> Result<Vec<&[u8]>, BadCapture> {
    let magic = capture.first_chunk::<4>().ok_or(BadCapture::Format)?;
    // Times in microseconds or nanoseconds.
    let is_little = match u32::from_le_bytes(*magic) {
        0xa1b2_c3d4 | 0xa1b2_3c4d => true,
        0xd4c3_b2a1 | 0x4d3c_b2a1 => false,
        _ => return Err(BadCapture::Format),
    };
    let number = |at: usize| {
        let bytes = capture.get(at..)?.first_chunk::<4>()?;
        Some(if is_little { u32::from_le_bytes(*bytes) } else { u32::from_be_bytes(*bytes) })
    };
    match number(20).ok_or(BadCapture::Format)? & 0x0fff_ffff {
        1 => (),
        other => return Err(BadCapture::LinkType(other)),
    }
    let (mut frames, mut at) = (Vec::new(), 24);
    while at < capture.len() {
        let cut = BadCapture::Cut(frames.len() + 1);
        let (Some(held), Some(whole)) = (number(at + 8), number(at + 12)) else { return Err(cut) };
        let frame = capture.get(at + 16..).and_then(|rest| rest.get(..held as usize));
        frames.push(frame.filter(|_| held >= whole).ok_or(cut)?);
        at += 16 + held as usize;
    }
    Ok(frames)
}
