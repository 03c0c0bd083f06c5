//! Reads a capture of an Ethernet link and says what crossed it: connections, ports, bytes, and how
//! often some text was seen in clear. Holds one packet and a short tail per flow, never the file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const LINK_ETHERNET: u32 = 1;
/// Larger than any frame that the kernel hands to a capture.
const FRAME_BYTES_MAX: usize = 1 << 20;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The packet that ends a capture carries this; it is no traffic of anybody's.
pub(super) const SENTINEL: &[u8] = b"end of the capture";

/// What crossed the link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// TCP connections that somebody tried to open: client and server address and port.
    pub connections: BTreeSet<(IpAddr, u16, IpAddr, u16)>,
    /// Payload bytes of TCP by source address, each byte once, repeats left out.
    pub tcp_bytes: BTreeMap<IpAddr, u64>,
    /// IP packets that were neither TCP nor neighbour discovery, by IP protocol number.
    pub other_packets: BTreeMap<u8, u64>,
    /// How often each of the texts was seen.
    pub seen: Vec<u64>,
    /// Frames in the file.
    pub frames: u64,
}

impl Traffic {
    /// The ports to which connections were tried.
    pub fn destination_ports(&self) -> BTreeSet<u16> {
        self.connections.iter().map(|(_, _, _, port)| *port).collect()
    }

    /// Payload bytes both ways.
    pub fn bytes(&self) -> u64 {
        self.tcp_bytes.values().sum()
    }

    /// Reads a file that tcpdump wrote, counting each of `texts`, also across packets of a flow.
    ///
    /// # Errors
    /// No capture of an Ethernet link, or a packet that was not captured whole.
    pub fn read(path: &Path, texts: &[&[u8]]) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut reading = Reading::new(texts);
        let big_endian = read_file_header(&mut reader)?;
        let mut frame = Vec::new();
        while read_frame(&mut reader, big_endian, &mut frame)? {
            reading.take_frame(&frame);
        }
        Ok(reading.traffic)
    }
}

fn number(bytes: &[u8], big_endian: bool) -> u32 {
    let four = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if big_endian { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) }
}

fn read_file_header(reader: &mut impl Read) -> Result<bool> {
    let mut header = [0u8; 24];
    reader.read_exact(&mut header).context("no capture header")?;
    let known = |big| matches!(number(&header, big), MAGIC_MICROSECONDS | MAGIC_NANOSECONDS);
    let big_endian = known(true);
    ensure!(big_endian || known(false), "no capture file");
    ensure!(number(&header[20..], big_endian) == LINK_ETHERNET, "no capture of an Ethernet link");
    Ok(big_endian)
}

fn read_frame(reader: &mut impl Read, big_endian: bool, frame: &mut Vec<u8>) -> Result<bool> {
    let mut header = [0u8; 16];
    match reader.read_exact(&mut header) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    let captured = number(&header[8..], big_endian) as usize;
    let on_the_wire = number(&header[12..], big_endian) as usize;
    ensure!(captured <= FRAME_BYTES_MAX, "a frame of {captured} bytes");
    if captured != on_the_wire {
        bail!("only {captured} of a frame's {on_the_wire} bytes were captured");
    }
    frame.resize(captured, 0);
    reader.read_exact(frame).context("the capture ends within a frame")?;
    Ok(true)
}

type FlowKey = (IpAddr, u16, IpAddr, u16);

/// One direction of a TCP connection: what comes next, and the last bytes, where a text may begin.
#[derive(Debug, Default)]
struct Flow {
    next_seq: Option<u32>,
    tail: Vec<u8>,
}

struct Reading<'t> {
    texts: &'t [&'t [u8]],
    longest: usize,
    flows: HashMap<FlowKey, Flow>,
    traffic: Traffic,
}

struct Segment<'p> {
    key: FlowKey,
    seq: u32,
    flags: u8,
    payload: &'p [u8],
}

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

impl<'t> Reading<'t> {
    fn new(texts: &'t [&'t [u8]]) -> Self {
        let traffic = Traffic { seen: vec![0; texts.len()], ..Traffic::default() };
        let longest = texts.iter().map(|t| t.len()).max().unwrap_or(0);
        Self { texts, longest, flows: HashMap::new(), traffic }
    }

    fn take_frame(&mut self, frame: &[u8]) {
        self.traffic.frames += 1;
        let Some((source, destination, protocol, packet)) = ip_packet(frame) else {
            self.search(frame, 0);
            return;
        };
        match protocol {
            TCP => match segment(source, destination, packet) {
                Some(segment) => self.take_segment(&segment),
                None => self.search(packet, 0),
            },
            ICMPV6 if packet.first().is_some_and(|kind| (130..=143).contains(kind)) => {}
            // The last packet of a capture, and the complaint that nobody listens there.
            UDP | ICMP if packet.ends_with(SENTINEL) => {}
            _ => {
                *self.traffic.other_packets.entry(protocol).or_default() += 1;
                self.search(packet, 0);
            }
        }
    }

    fn take_segment(&mut self, segment: &Segment<'_>) {
        if segment.flags & SYN != 0 {
            if segment.flags & ACK == 0 {
                self.traffic.connections.insert(segment.key);
            }
            self.flows
                .insert(segment.key, Flow { next_seq: Some(segment.seq.wrapping_add(1)), tail: Vec::new() });
            return;
        }
        let mut flow = self.flows.remove(&segment.key).unwrap_or_default();
        self.take_payload(&mut flow, segment);
        self.flows.insert(segment.key, flow);
    }

    /// Bytes that came before are skipped; after a gap the tail no longer fits and is dropped.
    fn take_payload(&mut self, flow: &mut Flow, segment: &Segment<'_>) {
        let ahead = flow.next_seq.map_or(0, |next| segment.seq.wrapping_sub(next).cast_signed());
        let repeated = usize::try_from(-i64::from(ahead)).unwrap_or(0).min(segment.payload.len());
        let fresh = &segment.payload[repeated..];
        if fresh.is_empty() {
            return;
        }
        if ahead > 0 {
            flow.tail.clear();
        }
        let old = flow.tail.len();
        flow.tail.extend_from_slice(fresh);
        self.search(&flow.tail, old);
        flow.tail.drain(..flow.tail.len().saturating_sub(self.longest.saturating_sub(1)));
        flow.next_seq = Some(segment.seq.wrapping_add(segment.payload.len() as u32));
        *self.traffic.tcp_bytes.entry(segment.key.0).or_default() += fresh.len() as u64;
    }

    /// Counts each text that ends in `bytes` after the first `old` of them.
    fn search(&mut self, bytes: &[u8], old: usize) {
        for (text, seen) in self.texts.iter().zip(&mut self.traffic.seen) {
            let from = (old + 1).saturating_sub(text.len());
            *seen += count(&bytes[from.min(bytes.len())..], text);
        }
    }
}

fn count(mut bytes: &[u8], text: &[u8]) -> u64 {
    let (Some(first), mut found) = (text.first(), 0) else {
        return 0;
    };
    while let Some(at) = bytes.iter().position(|b| b == first) {
        found += u64::from(bytes[at..].starts_with(text));
        bytes = &bytes[at + 1..];
    }
    found
}

fn ip_packet(frame: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let packet = frame.get(14..)?;
    match frame.get(12..14)? {
        [0x08, 0x00] => ipv4(packet),
        [0x86, 0xdd] => ipv6(packet),
        _ => None,
    }
}

/// Ethernet pads short frames, so the packet's own length counts; 0 is one of over 64 KiB.
fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let length = match usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?)) {
        0 => packet.len(),
        length => length,
    };
    let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    Some((source.into(), destination.into(), *packet.get(9)?, packet.get(header..length)?))
}

fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let end = match usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?)) {
        0 => packet.len(),
        length => 40 + length,
    };
    let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
    let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    let (protocol, body) = (*packet.get(6)?, packet.get(40..end)?);
    // Multicast listener reports come behind a hop-by-hop header; the kernel sends them by itself.
    match protocol {
        0 => Some((
            source.into(),
            destination.into(),
            *body.first()?,
            body.get(8 + usize::from(*body.get(1)?) * 8..)?,
        )),
        _ => Some((source.into(), destination.into(), protocol, body)),
    }
}

fn segment(source: IpAddr, destination: IpAddr, packet: &[u8]) -> Option<Segment<'_>> {
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let header = usize::from(packet.get(12)? >> 4) * 4;
    Some(Segment {
        key: (source, port(0)?, destination, port(2)?),
        seq: u32::from_be_bytes(packet.get(4..8)?.try_into().ok()?),
        flags: *packet.get(13)?,
        payload: packet.get(header..)?,
    })
}
