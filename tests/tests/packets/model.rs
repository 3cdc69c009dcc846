//! What the programs should do with a packet, in plain Rust over plain collections.
//!
//! The model is told what the program did and says whether that was right. It follows the
//! program's free choices (which backend, which source port) after having checked that they were
//! among the allowed ones; everything else it predicts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use penstock_common::{Algorithm, Counter, ServiceId, Traffic, V4, V6, client_hash, slot_at};

use crate::frame::{self, Header, SCTP, TCP, UDP};

pub type Endpoint = (IpAddr, u16);

#[derive(Clone, Debug)]
pub struct Service {
    pub frontend: Endpoint,
    pub proto: u8,
    pub backends: Vec<Endpoint>,
    pub drops_when_empty: bool,
    pub has_affinity: bool,
    pub algorithm: Algorithm,
}

/// What went to a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    pub connections: u64,
    pub request: Traffic,
    pub reply: Traffic,
}

#[derive(Clone, Debug)]
pub struct Flow {
    pub proto: u8,
    pub service: ServiceId,
    pub client: Endpoint,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    pub source: Endpoint,
    pub is_established: bool,
    /// One end at least is done.
    pub is_closing: bool,
    /// Both are.
    pub is_closed: bool,
    /// Who has sent a FIN: 1 is the client, 2 the backend; the first of the two once both have.
    pub fins: u8,
    /// The backend has nothing to remember.
    pub is_over: bool,
    /// Its port was that of a flow that was over.
    pub is_successor: bool,
}

impl Flow {
    pub fn is_hairpin(&self) -> bool {
        self.client.0 == self.backend.0
    }

    /// Whether its backend has yet to agree to it, at another flow's port.
    fn is_unanswered(&self) -> bool {
        self.proto == TCP && self.is_successor && !self.is_established && !self.is_closed
    }
}

#[derive(Default)]
pub struct Model {
    pub services: Vec<Service>,
    /// Addresses of services.
    pub service_addrs: BTreeSet<IpAddr>,
    pub nodes: Vec<IpAddr>,
    pub flows: Vec<Option<Flow>>,
    by_request: HashMap<(u8, Endpoint, Endpoint), usize>,
    by_reply: HashMap<(u8, Endpoint, Endpoint), usize>,
    affinity: HashMap<(Endpoint, u8, IpAddr), Endpoint>,
    turns: HashMap<(Endpoint, u8), usize>,
    fragments: HashMap<(IpAddr, IpAddr, u32, u8), (u16, u16)>,
    pub counts: BTreeMap<Counter, u64>,
    pub tallies: BTreeMap<(ServiceId, Endpoint), Tally>,
    /// SCTP packets that got other ports, each way: with a checksum, and with one left open.
    pub sctp: [[u64; 2]; 2],
    errors_sent: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hook {
    FromPod,
    ToPod,
}

pub const NEXT: i32 = -1;
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;

struct Segment {
    header: Header,
    src: Endpoint,
    dst: Endpoint,
    tcp_flags: u8,
}

/// The id of the service at a place in the list.
pub fn service_id(index: usize) -> ServiceId {
    ServiceId(1 + index as u32)
}

/// How many connections a backend, by its place among its service's, had before; as `LOADS` say.
pub fn load_before(place: usize) -> u64 {
    [300, 0, 2_000, 40][place % 4]
}

/// The weight of a backend, by its place, where that counts.
pub fn weight(place: usize) -> u16 {
    [1, 2, 10, 1][place % 4]
}

/// What a program did.
pub struct Done<'a> {
    pub verdict: i32,
    pub frame: &'a [u8],
}

type Check = Result<(), String>;

impl Model {
    pub fn counted(&mut self, counter: Counter) {
        *self.counts.entry(counter).or_default() += 1;
    }

    /// Checks what the program at `hook` made of `input`.
    pub fn check(&mut self, hook: Hook, input: &[u8], done: &Done<'_>) -> Check {
        let untouched = || same(done, NEXT, input);
        let Some(is_v4) = frame::family(input) else {
            return untouched();
        };
        let Some(addrs) = frame::addrs(input, 14, is_v4) else {
            return untouched();
        };
        let header = frame::header(input, 14, is_v4);
        match hook {
            Hook::ToPod => match header {
                Some(header) => self.back(input, &header, done, false),
                None => untouched(),
            },
            Hook::FromPod if self.service_addrs.contains(&addrs.1) => match header {
                Some(header) => self.towards_service(input, header, done),
                None => self.drops(input, done, Counter::Truncated),
            },
            Hook::FromPod if self.nodes.contains(&addrs.1) => match header {
                Some(header) => self.back(input, &header, done, true),
                None => untouched(),
            },
            Hook::FromPod => untouched(),
        }
    }

    fn drops(&mut self, input: &[u8], done: &Done<'_>, reason: Counter) -> Check {
        self.counted(reason);
        same(done, SHOT, input)
    }

    fn towards_service(&mut self, input: &[u8], header: Header, done: &Done<'_>) -> Check {
        if header.proto == frame::icmp_number(header.src) {
            return self.error_to_service(input, &header, done);
        }
        if ![TCP, UDP, SCTP].contains(&header.proto) {
            return same(done, NEXT, input);
        }
        let segment = match self.segment(input, header) {
            Ok(segment) => segment,
            Err(reason) => return self.drops(input, done, reason),
        };
        let key = (segment.header.proto, segment.src, segment.dst);
        let known = self.by_request.get(&key).copied();
        if let Some(id) = known {
            let flow = self.flows[id].as_ref().expect("indexed flows exist");
            let opens = key.0 != UDP && segment.tcp_flags & 0x12 == 2;
            if opens && flow.is_closing {
                self.remove(id);
            } else {
                self.follow(id, &segment, false);
                return self.translated_request(input, id, &segment, done);
            }
        }
        self.open(input, &segment, done)
    }

    /// Makes no datagram's parts known.
    pub fn forget_parts(&mut self) {
        self.fragments.clear();
    }

    /// The fields, with the ports of an earlier fragment where there are none.
    fn segment(&mut self, input: &[u8], header: Header) -> Result<Segment, Counter> {
        let key = (header.src, header.dst, header.id, header.proto);
        if header.is_later {
            let ports = *self.fragments.get(&key).ok_or(Counter::FragmentUnmatched)?;
            return Ok(Segment {
                src: (header.src, ports.0),
                dst: (header.dst, ports.1),
                header,
                tcp_flags: 0,
            });
        }
        let at = header.transport;
        let needed = match header.proto {
            TCP => 20,
            SCTP => 14,
            _ => 8,
        };
        let ports = frame::ports(input, at).ok_or(Counter::Truncated)?;
        if header.proto == SCTP && header.is_part {
            // Its checksum covers what is not there.
            return Err(Counter::RewriteFailed);
        }
        if input.len() < at + needed {
            return Err(Counter::Truncated);
        }
        if header.proto == SCTP && header.length < 16 {
            return Err(Counter::Truncated);
        }
        Ok(Segment {
            src: (header.src, ports.0),
            dst: (header.dst, ports.1),
            tcp_flags: match header.proto {
                TCP => input[at + 13],
                SCTP => match input[at + 12] {
                    1 => 2,
                    2 => 0x12,
                    6 => 4,
                    7 | 8 => 0x11,
                    _ => 0x10,
                },
                _ => 0,
            },
            header,
        })
    }

    fn remember(&mut self, segment: &Segment) {
        let header = &segment.header;
        if header.is_part && !header.is_later {
            let key = (header.src, header.dst, header.id, header.proto);
            self.fragments.insert(key, (segment.src.1, segment.dst.1));
        }
    }

    /// Who gets a client that nothing binds, where that is not left to chance.
    fn due(&self, service: &Service, client: IpAddr) -> Option<Endpoint> {
        if service.has_affinity {
            return None;
        }
        let count = service.backends.len();
        let place = match service.algorithm {
            Algorithm::Random | Algorithm::Weighted | Algorithm::LeastConnections => return None,
            // Who is first is left to chance.
            Algorithm::RoundRobin => self.turns.get(&(service.frontend, service.proto))? % count,
            Algorithm::SourceHash | Algorithm::Maglev => {
                let hash = match client {
                    IpAddr::V4(ip) => client_hash(&V4::from(ip)),
                    IpAddr::V6(ip) => client_hash(&V6::from(ip)),
                };
                slot_at(hash, count as u32) as usize
            }
        };
        service.backends.get(place).copied()
    }

    fn open(&mut self, input: &[u8], segment: &Segment, done: &Done<'_>) -> Check {
        let found = self.services.iter().position(|service| {
            service.frontend == segment.dst && service.proto == segment.header.proto
        });
        let Some(index) = found else {
            return self.refused(input, segment, done, Counter::UndefinedPort);
        };
        let service = self.services[index].clone();
        if segment.header.is_later {
            return self.drops(input, done, Counter::FragmentUnmatched);
        }
        if service.backends.is_empty() {
            if service.drops_when_empty {
                return self.drops(input, done, Counter::NoLocalEndpoints);
            }
            return self.refused(input, segment, done, Counter::NoEndpoints);
        }
        // The program was free to choose: see what it chose.
        let is_v4 = segment.src.0.is_ipv4();
        let out = frame::header(done.frame, 14, is_v4).ok_or("output is not IP")?;
        let allowed: Vec<Endpoint> = service
            .backends
            .iter()
            .copied()
            .filter(|backend| backend.0 == out.dst)
            .collect();
        let (source, port) = frame::ports(done.frame, out.transport).ok_or("no ports")?;
        let backend = (out.dst, port);
        if !allowed.contains(&backend) {
            return Err(format!("{backend:?} is no backend of {service:?}"));
        }
        let is_hairpin = backend.0 == segment.src.0;
        let node = self
            .nodes
            .iter()
            .copied()
            .find(|node| node.is_ipv4() == is_v4);
        let source_addr = if is_hairpin {
            node.ok_or("no node address")?
        } else {
            segment.src.0
        };
        let wish = (source_addr, segment.src.1);
        let proto = segment.header.proto;
        let holder = |model: &Self, source| model.by_reply.get(&(proto, backend, source)).copied();
        let is_free = |model: &Self, source| {
            let flow = holder(model, source).and_then(|id| model.flows[id].as_ref());
            flow.is_none_or(|flow| flow.is_over)
        };
        let source = (source_addr, source);
        let keeps = !is_hairpin && is_free(self, wish);
        if keeps && source != wish {
            return Err(format!("source {source:?} although {wish:?} was free"));
        }
        if !keeps && (!is_free(self, source) || source.1 < 61_000) {
            return Err(format!("source {source:?} is taken or out of range"));
        }
        if let Some(due) = self.due(&service, segment.src.0)
            && due != backend
        {
            return Err(format!("{due:?} was due, got {backend:?} of {service:?}"));
        }
        if service.algorithm == Algorithm::LeastConnections {
            let load = |at: usize| {
                let backend = service.backends[at];
                let tally = self.tallies.get(&(service_id(index), backend));
                load_before(at) + tally.map_or(0, |tally| tally.connections)
            };
            let is_heavier = |at: usize, than: usize| {
                load(at) * u64::from(weight(than)) >= load(than) * u64::from(weight(at))
            };
            let places = 0..service.backends.len();
            let mut chosen = places.clone().filter(|at| service.backends[*at] == backend);
            let chosen = chosen.next().ok_or("no such backend")?;
            // Who is chosen was compared with some other one.
            if !places
                .clone()
                .any(|at| at != chosen && is_heavier(at, chosen))
            {
                let loads: Vec<u64> = places.map(load).collect();
                return Err(format!("{chosen} is the heaviest of {loads:?}"));
            }
        }
        let mut backends = service.backends.iter();
        if let Some(place) = backends.position(|other| *other == backend) {
            let key = (service.frontend, service.proto);
            self.turns.insert(key, place + 1);
        }
        if service.has_affinity {
            let key = (service.frontend, proto, segment.src.0);
            let bound = *self.affinity.entry(key).or_insert(backend);
            if bound != backend {
                return Err(format!("client is bound to {bound:?}, got {backend:?}"));
            }
        }
        let predecessor = holder(self, source);
        let is_successor = predecessor.is_some();
        if let Some(over) = predecessor {
            self.remove(over);
            self.counted(Counter::FlowEvicted);
        }
        let id = self.flows.len();
        self.by_request
            .insert((proto, segment.src, segment.dst), id);
        self.by_reply.insert((proto, backend, source), id);
        let service = service_id(index);
        let tally = self.tallies.entry((service, backend)).or_default();
        tally.connections += 1;
        self.flows.push(Some(Flow {
            proto,
            service,
            client: segment.src,
            frontend: segment.dst,
            backend,
            source,
            is_established: false,
            is_closing: false,
            is_closed: false,
            fins: 0,
            is_over: false,
            is_successor,
        }));
        self.counted(Counter::FlowCreated);
        self.follow(id, segment, false);
        self.translated_request(input, id, segment, done)
    }

    fn remove(&mut self, id: usize) {
        if let Some(flow) = self.flows[id].take() {
            self.by_request
                .remove(&(flow.proto, flow.client, flow.frontend));
            self.by_reply
                .remove(&(flow.proto, flow.backend, flow.source));
        }
    }

    fn follow(&mut self, id: usize, segment: &Segment, is_reply: bool) {
        let flow = self.flows[id].as_mut().expect("indexed flows exist");
        let (fin, syn, rst, ack) = (1, 2, 4, 16);
        let has = |flag| segment.tcp_flags & flag != 0;
        let own = if is_reply { 2 } else { 1 };
        let acknowledges = !has(fin) && has(ack) && flow.is_closed && flow.fins == 1;
        if !is_reply && (has(rst) || acknowledges) {
            flow.is_over = true;
        }
        if has(rst) {
            flow.is_closed = true;
        } else if has(fin) {
            if flow.is_closed || !flow.is_established || flow.fins | own == 3 {
                flow.is_closed = true;
            } else {
                flow.fins = own;
            }
        } else if is_reply && (!flow.is_unanswered() || has(syn)) {
            flow.is_established = true;
        }
        flow.is_closing = flow.is_closed || flow.fins != 0;
        let tally = self
            .tallies
            .entry((flow.service, flow.backend))
            .or_default();
        let way = if is_reply {
            &mut tally.reply
        } else {
            &mut tally.request
        };
        way.packets += 1;
        way.bytes += (segment.header.transport - 14 + segment.header.length) as u64;
    }

    /// Notes an SCTP packet whose ports change.
    fn count_sctp(&mut self, input: &[u8], segment: &Segment, src: Endpoint, dst: Endpoint) {
        let header = &segment.header;
        let is_changed = (src.1, dst.1) != (segment.src.1, segment.dst.1);
        if header.proto == SCTP && is_changed && !header.is_later {
            let at = header.transport + 8;
            let is_open = input.get(at..at + 4) == Some(&[0; 4]);
            let is_reply = self.service_addrs.contains(&src.0);
            self.sctp[usize::from(is_reply)][usize::from(is_open)] += 1;
        }
    }

    fn translated_request(
        &mut self,
        input: &[u8],
        id: usize,
        segment: &Segment,
        done: &Done<'_>,
    ) -> Check {
        self.remember(segment);
        let flow = self.flows[id].clone().expect("indexed flows exist");
        let out = replaced(input, segment, flow.source, flow.backend);
        self.count_sctp(input, segment, flow.source, flow.backend);
        self.counted(Counter::PacketRequest);
        delivered(input, done, out, flow.is_hairpin())
    }

    /// Replies and errors about requests, on their way to the client.
    fn back(&mut self, input: &[u8], header: &Header, done: &Done<'_>, from: bool) -> Check {
        let _ = from;
        if header.proto == frame::icmp_number(header.src) {
            return self.error_to_client(input, header, done);
        }
        if ![TCP, UDP, SCTP].contains(&header.proto) {
            return same(done, NEXT, input);
        }
        let Ok(segment) = self.segment(input, header.clone()) else {
            return same(done, NEXT, input);
        };
        let key = (header.proto, segment.src, segment.dst);
        let Some(id) = self.by_reply.get(&key).copied() else {
            return same(done, NEXT, input);
        };
        let flow = self.flows[id].as_ref().expect("indexed flows exist");
        if flow.proto != UDP && flow.is_closing && segment.tcp_flags & 0x12 == 0x12 {
            // Of a connection past the service, from the port that this one had.
            self.remove(id);
            return same(done, NEXT, input);
        }
        if flow.is_unanswered() && segment.tcp_flags & 6 == 0 {
            let header = &segment.header;
            let offset = input.get(header.transport + 12).copied().unwrap_or(0) >> 4;
            let is_bare = header.length == usize::from(offset) * 4;
            if header.is_later || !is_bare || segment.tcp_flags & 1 != 0 {
                // What the port's last flow left.
                return self.drops(input, done, Counter::FlowRace);
            }
        }
        self.remember(&segment);
        self.follow(id, &segment, true);
        let flow = self.flows[id].clone().expect("indexed flows exist");
        self.count_sctp(input, &segment, flow.frontend, flow.client);
        self.counted(Counter::PacketReply);
        let out = replaced(input, &segment, flow.frontend, flow.client);
        delivered(input, done, out, flow.is_hairpin())
    }

    /// An error whose quote was `source → backend` when it left for the backend.
    fn error_to_client(&mut self, input: &[u8], header: &Header, done: &Done<'_>) -> Check {
        let Some((inner, src, dst)) = quote(input, header) else {
            return same(done, NEXT, input);
        };
        let Some(id) = self.by_reply.get(&(inner.proto, dst, src)).copied() else {
            return same(done, NEXT, input);
        };
        let flow = self.flows[id].clone().expect("indexed flows exist");
        let speaker = if header.src == flow.backend.0 {
            flow.frontend.0
        } else {
            header.src
        };
        let mut out = input.to_vec();
        put_addrs(&mut out, 14, speaker, flow.client.0);
        put_addrs(
            &mut out,
            header.transport + 8,
            flow.client.0,
            flow.frontend.0,
        );
        put_ports(&mut out, inner.transport, flow.client.1, flow.frontend.1);
        self.counted(Counter::IcmpError);
        delivered(input, done, out, flow.is_hairpin())
    }

    /// An error whose quote was `frontend → client` when it reached the client.
    fn error_to_service(&mut self, input: &[u8], header: &Header, done: &Done<'_>) -> Check {
        let Some((inner, src, dst)) = quote(input, header) else {
            return same(done, NEXT, input);
        };
        let Some(id) = self.by_request.get(&(inner.proto, dst, src)).copied() else {
            return same(done, NEXT, input);
        };
        let flow = self.flows[id].clone().expect("indexed flows exist");
        let mut out = input.to_vec();
        put_addrs(&mut out, 14, flow.source.0, flow.backend.0);
        put_addrs(
            &mut out,
            header.transport + 8,
            flow.backend.0,
            flow.source.0,
        );
        put_ports(&mut out, inner.transport, flow.backend.1, flow.source.1);
        self.counted(Counter::IcmpError);
        delivered(input, done, out, flow.is_hairpin())
    }

    /// A refusal: a reset or an ICMP error from the address that was dialled.
    fn refused(
        &mut self,
        input: &[u8],
        segment: &Segment,
        done: &Done<'_>,
        reason: Counter,
    ) -> Check {
        self.counted(reason);
        if segment.header.is_later {
            return self.drops(input, done, Counter::FragmentUnmatched);
        }
        let is_tcp = segment.header.proto == TCP;
        if is_tcp && segment.tcp_flags & 4 != 0 {
            return self.drops(input, done, Counter::RejectUnanswered);
        }
        if !is_tcp && done.verdict == SHOT {
            // Only so many in a second; how many a second of the program's clock sees is its own.
            if self.errors_sent < 1_000 {
                return Err("an ICMP error was withheld too early".into());
            }
            return self.drops(input, done, Counter::RejectUnanswered);
        }
        if done.verdict != REDIRECT {
            return Err(format!("a refusal ended in verdict {}", done.verdict));
        }
        let out = done.frame;
        if out[0..6] != input[6..12] || out[6..12] != input[0..6] {
            return Err("the refusal does not go back to the sender's MAC".into());
        }
        let is_v4 = segment.src.0.is_ipv4();
        let answer = frame::header(out, 14, is_v4).ok_or("the refusal is not IP")?;
        let checksum = |frame: &[u8], header: &Header| {
            let at = header.transport + 16;
            (frame.get(at..at + 2) == Some(&frame::pseudo_checksum(header).to_be_bytes()))
                .then_some(())
        };
        // A sender that leaves the checksum to its interface puts the pseudo header's sum there;
        // so may, once in 65,536 segments, chance.
        let is_left_open = is_tcp_left_open(&segment.header, || checksum(input, &segment.header));
        if is_left_open {
            checksum(out, &answer).ok_or("the reset's checksum is not left open")?;
        } else if frame::wrongs(out).iter().any(|wrong| *wrong != 0) {
            return Err(format!(
                "the refusal's checksums are wrong: {:?}",
                frame::wrongs(out)
            ));
        }
        if (answer.src, answer.dst) != (segment.dst.0, segment.src.0) {
            return Err(format!("the refusal goes {} -> {}", answer.src, answer.dst));
        }
        let at = answer.transport;
        if !is_tcp {
            self.errors_sent += 1;
            let expected = if is_v4 { [1, 3, 3] } else { [58, 1, 4] };
            if [answer.proto, out[at], out[at + 1]] != expected {
                return Err("not a right port unreachable".into());
            }
            let Some((inner, src, dst)) = quote(out, &answer) else {
                return Err("the error quotes nothing".into());
            };
            if (inner.proto, src, dst) != (segment.header.proto, segment.src, segment.dst) {
                return Err("the error quotes another packet".into());
            }
            // As much as shows the tag of an association that is to begin.
            let from = &input[segment.header.transport..];
            let most = if inner.proto == SCTP && from.len() >= 20 {
                20
            } else {
                8
            };
            if out[inner.transport..] != from[..most] {
                return Err("the error quotes too little or too much".into());
            }
            return Ok(());
        }
        let word = |bytes: &[u8], at: usize| {
            u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
        };
        let from = segment.header.transport;
        let header_length = u32::from(input[from + 12] >> 4) * 4;
        let payload = (segment.header.length as u32).wrapping_sub(header_length);
        let flags = segment.tcp_flags;
        let (seq, ack, expected) = if flags & 0x10 != 0 {
            (word(input, from + 8), 0, 4)
        } else {
            let counted = payload
                .wrapping_add(u32::from(flags & 2 != 0))
                .wrapping_add(u32::from(flags & 1 != 0));
            (0, word(input, from + 4).wrapping_add(counted), 0x14)
        };
        let ports = frame::ports(out, at);
        let is_right = answer.proto == TCP
            && answer.length == 20
            && ports == Some((segment.dst.1, segment.src.1))
            && (word(out, at + 4), word(out, at + 8), out[at + 13]) == (seq, ack, expected);
        if is_right {
            Ok(())
        } else {
            Err("not a right reset".into())
        }
    }
}

fn is_tcp_left_open(header: &Header, is_open: impl Fn() -> Option<()>) -> bool {
    header.proto == TCP && is_open().is_some()
}

/// The quoted TCP or UDP packet of an ICMP error.
fn quote(input: &[u8], header: &Header) -> Option<(Header, Endpoint, Endpoint)> {
    if header.is_later {
        return None;
    }
    let is_v4 = header.src.is_ipv4();
    // A type in the frame's very last byte quotes nothing anyway.
    let kind = *input.get(header.transport..header.transport + 2)?.first()?;
    let is_error = if is_v4 {
        [3, 4, 11, 12].contains(&kind)
    } else {
        kind < 128
    };
    let inner = frame::header(input, header.transport + 8, is_v4).filter(|_| is_error)?;
    if inner.is_later || ![TCP, UDP, SCTP].contains(&inner.proto) {
        return None;
    }
    let (src, dst) = frame::ports(input, inner.transport)?;
    let (from, to) = ((inner.src, src), (inner.dst, dst));
    Some((inner, from, to))
}

fn put_addrs(out: &mut [u8], at: usize, src: IpAddr, dst: IpAddr) {
    let both = [frame::octets(src), frame::octets(dst)].concat();
    let at = at + if src.is_ipv4() { 12 } else { 8 };
    out[at..at + both.len()].copy_from_slice(&both);
}

fn put_ports(out: &mut [u8], at: usize, src: u16, dst: u16) {
    out[at..at + 2].copy_from_slice(&src.to_be_bytes());
    out[at + 2..at + 4].copy_from_slice(&dst.to_be_bytes());
}

fn replaced(input: &[u8], segment: &Segment, src: Endpoint, dst: Endpoint) -> Vec<u8> {
    let mut out = input.to_vec();
    put_addrs(&mut out, 14, src.0, dst.0);
    if !segment.header.is_later {
        put_ports(&mut out, segment.header.transport, src.1, dst.1);
    }
    out
}

/// Checks a translated frame: all bytes but checksums, and each checksum as wrong as it was.
fn delivered(input: &[u8], done: &Done<'_>, mut expected: Vec<u8>, is_hairpin: bool) -> Check {
    let verdict = if is_hairpin { REDIRECT } else { NEXT };
    if is_hairpin {
        let (dst, src) = (expected[0..6].to_vec(), expected[6..12].to_vec());
        expected[0..6].copy_from_slice(&src);
        expected[6..12].copy_from_slice(&dst);
    }
    if done.verdict != verdict {
        return Err(format!("verdict {} instead of {verdict}", done.verdict));
    }
    let (out, expected) = (without_checksums(done.frame), without_checksums(&expected));
    if out != expected {
        return Err(format!("frame\n{out:02x?}\ninstead of\n{expected:02x?}"));
    }
    let (before, after) = (frame::wrongs(input), frame::wrongs(done.frame));
    if before != after {
        return Err(format!(
            "checksums are wrong by {after:?}, and were by {before:?}"
        ));
    }
    Ok(())
}

/// Everything but the checksum fields; those that mean "none" stay.
fn without_checksums(frame: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    let Some(is_v4) = frame::family(frame) else {
        return out;
    };
    let Some(header) = frame::header(frame, 14, is_v4) else {
        return out;
    };
    if is_v4 {
        out[24..26].fill(0);
    }
    if header.is_later {
        return out;
    }
    let is_udp = header.proto == UDP;
    let mut clear = |at: usize| {
        if let Some(field) = out.get_mut(at..at + 2)
            && (!is_udp || field != [0, 0])
        {
            field.fill(0xff);
        }
    };
    match header.proto {
        TCP => clear(header.transport + 16),
        UDP => clear(header.transport + 6),
        SCTP => {
            let at = header.transport + 8;
            if let Some(field) = out.get_mut(at..at + 4)
                && field != [0; 4]
            {
                field.fill(0xff);
            }
        }
        1 => {
            clear(header.transport + 2);
            clear(header.transport + 18);
        }
        58 => clear(header.transport + 2),
        _ => {}
    }
    out
}

/// Checks a frame that nobody may have touched.
fn same(done: &Done<'_>, verdict: i32, input: &[u8]) -> Check {
    if done.verdict != verdict {
        return Err(format!("verdict {} instead of {verdict}", done.verdict));
    }
    if done.frame != input {
        return Err(format!("touched: {:02x?}", done.frame));
    }
    Ok(())
}
