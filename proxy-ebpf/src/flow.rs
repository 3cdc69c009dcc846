//! Conntrack: finds, creates, follows and retires the records of translated flows.
//!
//! Invariant: a record is reachable by both of its keys or on its way in or out; whoever moved its
//! state to `CLAIMED` or `RECLAIMING` is the only one to change anything but state and time. The
//! index alone says which source ports are taken: a key is inserted if it is not there, by one
//! program of all that try.

pub mod succession;

use penstock_common::{
    Addr, BackendFlags, Be16, Counter, Fins, Flow, FlowFlags, FlowId, FlowKey, FlowState,
    MASQUERADE_PORTS, PortChunk, PortPlace, PortRange, Proto, REMAPPED_PORTS,
    SCTP_ESTABLISHED_SECS,
};

use crate::{
    env::{Maps, Record},
    family::Family,
    packet::Packet,
    parse::{Segment, tcp},
    pod::Verdict,
};
use succession::inherit;

/// A flow that was found.
#[derive(Clone, Copy)]
pub struct Known<A, R> {
    /// Where its record is.
    pub id: FlowId,
    /// Its record.
    pub record: R,
    /// [`FlowState`].
    pub state: u32,
    /// [`FlowFlags`].
    pub flags: u16,
    /// The key of the other direction.
    pub other: FlowKey<A>,
}

impl<A: Addr, R> Known<A, R> {
    /// Source and destination that a packet gets which was found by its key: those of the other
    /// direction's packets, turned around.
    #[inline(always)]
    pub fn ends(&self) -> ((A, Be16), (A, Be16)) {
        (
            (self.other.dst, self.other.dst_port),
            (self.other.src, self.other.src_port),
        )
    }
}

/// The flow that `key` belongs to.
#[inline(always)]
pub fn find<F: Family, M: Maps<F>>(
    maps: &M,
    key: &FlowKey<F::Addr>,
) -> Option<Known<F::Addr, M::Record>> {
    known::<F, M>(maps, maps.flow_id(key)?, key)
}

/// The flow in a record, if it is the one that `key` belongs to.
#[inline(always)]
pub fn known<F: Family, M: Maps<F>>(
    maps: &M,
    id: FlowId,
    key: &FlowKey<F::Addr>,
) -> Option<Known<F::Addr, M::Record>> {
    let record = maps.record(id)?;
    let known = Known {
        id,
        record,
        state: record.state(),
        flags: record.flags(),
        other: record.key(key.direction ^ FlowKey::<F::Addr>::REPLY),
    };
    // Last, so that what was read before belongs to the same life of the record.
    (is_live(known.state) && record.key(key.direction) == *key).then_some(known)
}

/// Whether a request may go on in this flow, or must begin a new one.
#[inline(always)]
pub fn may_continue<F: Family, M: Maps<F>>(
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) -> bool {
    // Only TCP and SCTP have flags.
    let is_opening = segment.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    if is_opening && is_ending(known) {
        return false;
    }
    // UDP never sticks to a dead backend, and neither does what a client begins, whatever was known of its
    // port; an established TCP connection ends by itself.
    if segment.proto == Proto::UDP || is_opening {
        let (id, generation) = known.record.backend();
        // No service, no backend that could die.
        return generation == 0
            || maps
                .backend(id)
                .is_some_and(|backend| backend.is(generation, BackendFlags::LIVE));
    }
    true
}

/// Whether a reply is of another connection, which the client opened past the service from the same
/// port once this one was over: a backend agrees to a connection at its beginning only.
#[inline(always)]
pub fn is_anothers<A: Addr, R: Record<A>>(known: &Known<A, R>, segment: &Segment<A>) -> bool {
    let agrees = tcp::SYN | tcp::ACK;
    segment.proto.has_connections() && segment.tcp_flags & agrees == agrees && is_ending(known)
}

/// Whether one end at least has said that it is done.
#[inline(always)]
fn is_ending<A: Addr, R: Record<A>>(known: &Known<A, R>) -> bool {
    known.state == FlowState::CLOSING || known.record.fins() != 0
}

/// The state after an end has sent a FIN: until the other one does too it may go on for long, so
/// the flow stays.
#[inline(always)]
fn finish<A: Addr, R: Record<A>>(known: &Known<A, R>, is_reply: bool) -> u32 {
    let own = if is_reply {
        Fins::BACKEND
    } else {
        Fins::CLIENT
    };
    let before = known.record.fins();
    // Of a flow that is answered past this node nobody will see the other one.
    let is_one_way = known.flags & FlowFlags::DSR != 0;
    if is_one_way
        || known.state != FlowState::ESTABLISHED
        || before | own == Fins::CLIENT | Fins::BACKEND
    {
        return FlowState::CLOSING;
    }
    if before != own {
        // Where both ends' FINs meet here at once one may be lost: the flow goes a little later.
        known.record.set_fins(own);
    }
    known.state
}

/// Notes a packet of a flow.
#[inline(always)]
pub fn follow<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
    is_reply: bool,
) {
    follow_at::<F, M>(packet, maps, known, segment, is_reply, maps.now_secs());
}

/// The same for who knows what time it is.
#[inline(always)]
pub fn follow_at<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
    is_reply: bool,
    now: u32,
) {
    let state = known.state;
    if !is_reply {
        succession::note_request::<F, M>(packet, maps, known, segment);
    }
    let next = if segment.tcp_flags & tcp::RST != 0 {
        FlowState::CLOSING
    } else if segment.tcp_flags & tcp::FIN != 0 {
        finish(known, is_reply)
    } else if state == FlowState::EMBRYONIC
        && is_reply
        && succession::agrees::<F, M>(known, segment)
    {
        FlowState::ESTABLISHED
    } else {
        state
    };
    if next != state {
        known.record.exchange_state(state, next);
    }
    if now != known.record.last_seen().1 {
        known.record.touch(now);
    }
    let bytes = (segment.transport - segment.network) as u32 + u32::from(segment.transport_length);
    if maps.count_packet(known.id, is_reply, bytes) && !is_reply {
        let (id, generation) = known.record.backend();
        if generation != 0 {
            maps.count_connection(id, generation, known.record.service());
        }
    }
}

/// Takes a flow out: its next packet begins a new one.
#[inline(always)]
pub fn retire<F: Family, M: Maps<F>>(maps: &M, known: &Known<F::Addr, M::Record>) {
    if known
        .record
        .exchange_state(known.state, FlowState::RECLAIMING)
    {
        forget::<F, M>(maps, known.id, known.record);
        free::<F, M>(maps, known.id, known.record);
    }
}

/// Makes no key lead to a record of this program's own any more, and its counts its backend's.
#[inline(always)]
fn forget<F: Family, M: Maps<F>>(maps: &M, id: FlowId, record: M::Record) {
    unlink::<F, M>(maps, &record.key(FlowKey::<F::Addr>::REQUEST), id);
    give_back::<F, M>(maps, &record.key(FlowKey::<F::Addr>::REPLY), id);
    maps.settle(id);
}

/// Makes a key lead nowhere, unless it leads to another record than this.
#[inline(always)]
fn unlink<F: Family, M: Maps<F>>(maps: &M, key: &FlowKey<F::Addr>, id: FlowId) {
    if maps.flow_id(key) == Some(id) {
        maps.unlink(key);
    }
}

/// Gives a source port back. Only then it is counted, so that who counted before it looked at the
/// ports knows whether it has seen all that are free.
#[inline(always)]
fn give_back<F: Family, M: Maps<F>>(maps: &M, reply: &FlowKey<F::Addr>, id: FlowId) {
    unlink::<F, M>(maps, reply, id);
    maps.count_port_end(reply.port_place().index(reply.dst_port.to_host()));
}

/// Frees a record of this program's own that no key leads to.
#[inline(always)]
fn free<F: Family, M: Maps<F>>(maps: &M, id: FlowId, record: M::Record) {
    record.set_state(FlowState::FREE);
    maps.push_free(id);
}

/// Notes the flow that a packet begins. It gets what it needs by [`claim`], [`place`] and [`enter`],
/// in this order; nobody else knows of it before the last.
///
/// `flow.source` is what the backend is to see. If that is the client itself, its port is a wish.
#[inline(always)]
pub fn begin<F: Family, M: Maps<F>>(maps: &M, flow: &Flow<F::Addr>) -> Result<Verdict, Counter> {
    maps.opening().ok_or(Counter::FlowTableFull)?.store(flow);
    Ok(Verdict::Opening)
}

/// Gives the flow that was noted a record.
///
/// Where none is free, the oldest that gives way is found by a hand that goes around the table: one
/// that is embryonic stays for a whole turn, however many others come. Whoever calls this again as
/// long as it answers [`Verdict::NoRecord`] has it go on.
#[inline(always)]
pub fn claim<F: Family, M: Maps<F>>(maps: &M) -> Result<Verdict, Counter> {
    let opening = maps.opening().ok_or(Counter::FlowTableFull)?;
    Ok(match take_record::<F, M>(maps) {
        Some((id, record)) => {
            record.assume(opening);
            Verdict::Claimed(id)
        }
        None => Verdict::NoRecord,
    })
}

/// A record of this program's own, in state `CLAIMED`.
#[inline(always)]
fn take_record<F: Family, M: Maps<F>>(maps: &M) -> Option<(FlowId, M::Record)> {
    // What the queue holds are hints.
    let mut tries = 0;
    while tries < maps.attempts() {
        tries += 1;
        let Some(id) = maps.pop_free() else {
            break;
        };
        if let Some(record) = maps.record(id)
            && record.exchange_state(FlowState::FREE, FlowState::CLAIMED)
        {
            return Some((id, record));
        }
    }
    let start = maps.hand();
    let mut step = 0;
    while step < maps.reach() {
        let next = start.wrapping_add(step);
        step += 1;
        // There is one at least, which the compiler does not know.
        let id = FlowId(next.checked_rem(maps.records()).unwrap_or(0));
        if maps.evict(id) {
            maps.move_hand(next.wrapping_add(1));
            return maps.record(id).map(|record| (id, record));
        }
    }
    maps.move_hand(start.wrapping_add(step));
    None
}

/// Makes a record this program's own, in state `CLAIMED`, if it is free or its flow gives way. Whether it
/// was.
#[inline(always)]
pub fn evict<F: Family, M: Maps<F>>(maps: &M, id: FlowId) -> bool {
    let Some(record) = maps.record(id) else {
        return false;
    };
    let state = record.state();
    if !may_evict::<F, M>(maps, state, record) || !record.exchange_state(state, FlowState::CLAIMED)
    {
        return false;
    }
    if state != FlowState::FREE {
        forget::<F, M>(maps, id, record);
        maps.count(Counter::FlowEvicted);
    }
    true
}

/// The source ports that a flow may get.
#[inline(always)]
fn ports(flags: u16) -> PortRange {
    if flags & (FlowFlags::MASQUERADE | FlowFlags::EXTERNAL) != 0 {
        MASQUERADE_PORTS
    } else {
        REMAPPED_PORTS
    }
}

/// A port of a range, by chance.
#[inline(always)]
fn any_port<F: Family>(maps: &impl Maps<F>, (low, high): PortRange) -> u16 {
    let span = u32::from(high - low) + 1;
    low + penstock_common::slot_at(maps.random(), span) as u16
}

/// Gives a flow in its record a source that no other flow to its backend has: its wish, or a port by
/// chance, of which nearly every one is free until nearly every one is taken.
#[inline(always)]
pub fn place<F: Family, M: Maps<F>>(maps: &M, id: FlowId) -> Result<Verdict, Counter> {
    let record = maps.record(id).ok_or(Counter::FlowRace)?;
    let reply = record.key(FlowKey::<F::Addr>::REPLY);
    let wish = reply.dst_port.to_host();
    if record.key(FlowKey::<F::Addr>::REQUEST).src == reply.dst
        && (maps.take_port(id, wish) || maps.succeed(id, wish))
    {
        return Ok(Verdict::Placed);
    }
    if is_refusing(maps, reply.port_place()) {
        return Ok(Verdict::Search(0));
    }
    let ports = ports(record.flags());
    let mut tries = 0;
    while tries < maps.attempts() {
        tries += 1;
        let port = any_port(maps, ports);
        // Free ones first, as long as there are many of them.
        if maps.take_port(id, port) || (tries > maps.attempts() / 2 && maps.succeed(id, port)) {
            return Ok(Verdict::Placed);
        }
    }
    Ok(Verdict::Search(0))
}

/// Gives a flow in its record a source port that no other flow to its backend has. Whether it was free.
#[inline(always)]
pub fn take_port<F: Family, M: Maps<F>>(maps: &M, id: FlowId, port: u16) -> bool {
    let Some(record) = maps.record(id) else {
        return false;
    };
    // Before the key is there to be found, lest another flow take it for one that is left over.
    record.set_source_port(Be16::from_host(port));
    let reply = record.key(FlowKey::<F::Addr>::REPLY);
    // Looked at first: where most ports are taken, an insert at each costs all processors a lock.
    match maps.flow_id(&reply) {
        Some(other) if !is_left_over::<F, M>(maps, &reply, other) => false,
        _ => link(maps, &reply, id),
    }
}

/// Goes on looking for a free port from a chunk of the range on, which is counted from where this
/// client begins. Looks at all ports of one chunk at most, and at none of those known to be full.
///
/// Whoever calls this again with what it answers has looked at the whole range in the end, as
/// [`Verdict::TakeOver`] says.
#[inline(always)]
pub fn search<F: Family, M: Maps<F>>(maps: &M, id: FlowId, from: u32) -> Result<Verdict, Counter> {
    let record = maps.record(id).ok_or(Counter::FlowRace)?;
    let place = record.key(FlowKey::<F::Addr>::REPLY).port_place();
    let (low, high) = ports(record.flags());
    let first = u32::from(low) / PortChunk::PORTS;
    let chunks = u32::from(high) / PortChunk::PORTS - first + 1;
    let request = record.key(FlowKey::<F::Addr>::REQUEST);
    let begin = u32::from(request.src_port.to_host());
    let mut turn = from;
    let mut steps = 0;
    let (start, index, full) = loop {
        if turn >= chunks {
            return Ok(Verdict::TakeOver);
        }
        if steps >= PortChunk::PORTS {
            return Ok(Verdict::Search(turn));
        }
        let chunk = first + begin.wrapping_add(turn) % chunks;
        turn += 1;
        steps += 1;
        let start = (chunk * PortChunk::PORTS) as u16;
        let index = place.index(start);
        let known = maps.port_chunk(index);
        let full = PortChunk::when_full(place.check, known.ended);
        if known.full != full {
            break (start, index, full);
        }
    };
    let mut offset = 0;
    while offset < PortChunk::PORTS {
        let port = start | offset as u16;
        offset += 1;
        if port < low || port > high {
            continue;
        }
        if maps.take_port(id, port) {
            return Ok(Verdict::Placed);
        }
    }
    maps.set_full(index, full);
    Ok(Verdict::Search(turn))
}

/// What the element of a destination's port 0, which no flow gets, holds if a flow was refused within
/// this second.
#[inline(always)]
fn refusal<F: Family>(maps: &impl Maps<F>, place: PortPlace) -> u64 {
    PortChunk::when_full(place.check, maps.now_secs().into())
}

/// Whether a flow of a destination was refused within this second: neither chance nor flows that give
/// way are tried again before the next, since that costs more than any other packet.
#[inline(always)]
fn is_refusing<F: Family>(maps: &impl Maps<F>, place: PortPlace) -> bool {
    maps.port_chunk(place.index(0)).full == refusal(maps, place)
}

/// Where no port is free: takes one over from a flow that would give up its record too.
#[inline(always)]
pub fn take_over<F: Family, M: Maps<F>>(maps: &M, id: FlowId) -> Result<Verdict, Counter> {
    let record = maps.record(id).ok_or(Counter::FlowRace)?;
    let place = record.key(FlowKey::<F::Addr>::REPLY).port_place();
    if is_refusing(maps, place) {
        free::<F, M>(maps, id, record);
        return Err(Counter::NoSourcePort);
    }
    let ports = ports(record.flags());
    let mut tries = 0;
    while tries < 4 * maps.attempts() {
        tries += 1;
        let port = any_port(maps, ports);
        if maps.take_port(id, port) || maps.evict_port(id, port) {
            return Ok(Verdict::Placed);
        }
    }
    maps.set_full(place.index(0), refusal(maps, place));
    free::<F, M>(maps, id, record);
    Err(Counter::NoSourcePort)
}

/// Gives a flow in its record a source port of a flow that would give up its record too. Whether it did.
#[inline(always)]
pub fn evict_port<F: Family, M: Maps<F>>(maps: &M, id: FlowId, port: u16) -> bool {
    let Some(record) = maps.record(id) else {
        return false;
    };
    let mut reply = record.key(FlowKey::<F::Addr>::REPLY);
    reply.dst_port = Be16::from_host(port);
    let Some(other_id) = maps.flow_id(&reply) else {
        return false;
    };
    let Some(other) = maps.record(other_id) else {
        return false;
    };
    let state = other.state();
    if !may_evict::<F, M>(maps, state, other) || !other.exchange_state(state, FlowState::RECLAIMING)
    {
        return false;
    }
    // Of a key that is left from an earlier life of the record, the flow may go too.
    inherit::<F, M>(maps, id, &reply, other_id, other);
    true
}

/// Lets packets find a flow that has a record and a source. If another packet of the same flow was
/// faster, that one's counts.
#[inline(always)]
pub fn enter<F: Family, M: Maps<F>>(maps: &M, id: FlowId) -> Result<Verdict, Counter> {
    let record = maps.record(id).ok_or(Counter::FlowRace)?;
    // Before it can be found, so that whoever finds it can use it.
    record.set_state(FlowState::EMBRYONIC);
    let request = record.key(FlowKey::<F::Addr>::REQUEST);
    let mut tries = 0;
    let mut is_known = false;
    // Again where the key leads to a record that is just changing hands.
    while tries < maps.attempts() && !is_known {
        tries += 1;
        if link(maps, &request, id) {
            if !is_of::<F, M>(record, &request) {
                // It had to give way before its key was there to be taken out with it.
                unlink::<F, M>(maps, &request, id);
                return Err(Counter::FlowRace);
            }
            maps.count(Counter::FlowCreated);
            return Ok(Verdict::Opened);
        }
        is_known = find::<F, M>(maps, &request).is_some();
    }
    if record.exchange_state(FlowState::EMBRYONIC, FlowState::RECLAIMING) {
        give_back::<F, M>(maps, &record.key(FlowKey::<F::Addr>::REPLY), id);
        free::<F, M>(maps, id, record);
    }
    if is_known {
        Ok(Verdict::Opened)
    } else {
        Err(Counter::FlowRace)
    }
}

/// Whether a record is of the flow that begins with a request of this key.
#[inline(always)]
fn is_of<F: Family, M: Maps<F>>(record: M::Record, request: &FlowKey<F::Addr>) -> bool {
    is_live(record.state()) && record.key(FlowKey::<F::Addr>::REQUEST) == *request
}

/// Whether a record in this state is of a flow that packets can find.
#[inline(always)]
fn is_live(state: u32) -> bool {
    matches!(
        state,
        FlowState::EMBRYONIC | FlowState::ESTABLISHED | FlowState::CLOSING
    )
}

/// Makes a key lead to `id`, also where it leads to a record that is no longer the key's.
#[inline(always)]
fn link<F: Family, M: Maps<F>>(maps: &M, key: &FlowKey<F::Addr>, id: FlowId) -> bool {
    if maps.link(key, id) {
        return true;
    }
    let Some(other) = maps.flow_id(key) else {
        return false;
    };
    if !is_left_over::<F, M>(maps, key, other) {
        return false;
    }
    unlink::<F, M>(maps, key, other);
    maps.link(key, id)
}

/// Whether a key leads to a record that is no longer the key's.
#[inline(always)]
fn is_left_over<F: Family, M: Maps<F>>(maps: &M, key: &FlowKey<F::Addr>, id: FlowId) -> bool {
    maps.record(id).is_some_and(|record| {
        record.state() == FlowState::FREE || record.key(key.direction) != *key
    })
}

/// Embryonic and closing flows go first, established ones only once they have expired; half of one is
/// as good as closing once it was idle for that long.
#[inline(always)]
fn may_evict<F: Family, M: Maps<F>>(maps: &M, state: u32, record: M::Record) -> bool {
    match state {
        FlowState::FREE | FlowState::EMBRYONIC | FlowState::CLOSING => true,
        FlowState::ESTABLISHED => {
            let (proto, seen_secs) = record.last_seen();
            let timeouts = maps.config().timeouts;
            // A client alone has said so: who floods can too.
            let is_one_way = record.flags() & FlowFlags::DSR != 0;
            let timeout = match (is_one_way, proto.has_connections()) {
                (false, _) => lasts(state, proto, record.fins(), &timeouts),
                (true, true) => timeouts.tcp_closing_secs,
                (true, false) => timeouts.udp_secs,
            };
            idle_for(maps.now_secs(), seen_secs) >= timeout
        }
        _ => false,
    }
}

/// For how many seconds nothing was seen of a flow, by a clock that may be a little behind that of
/// who saw it.
#[inline(always)]
fn idle_for(now: u32, seen_secs: u32) -> u32 {
    let idle = now.wrapping_sub(seen_secs);
    if idle as i32 >= 0 { idle } else { 0 }
}

/// After how many idle seconds a flow is over.
#[inline(always)]
fn lasts(state: u32, proto: Proto, fins: u8, timeouts: &penstock_common::Timeouts) -> u32 {
    let has_connections = proto.has_connections();
    match state {
        FlowState::CLOSING => timeouts.tcp_closing_secs,
        FlowState::EMBRYONIC if has_connections => timeouts.tcp_syn_secs,
        FlowState::EMBRYONIC => timeouts.udp_secs,
        FlowState::ESTABLISHED if has_connections && fins != 0 => timeouts.tcp_closing_secs,
        FlowState::ESTABLISHED if proto == Proto::TCP => timeouts.tcp_established_secs,
        FlowState::ESTABLISHED if has_connections => SCTP_ESTABLISHED_SECS,
        FlowState::ESTABLISHED => timeouts.udp_stream_secs,
        _ => u32::MAX,
    }
}

/// The start of a flow to the outside, which will see `source`.
#[inline(always)]
pub fn masquerading<F: Family>(
    maps: &impl Maps<F>,
    segment: &Segment<F::Addr>,
    source: F::Addr,
) -> Flow<F::Addr> {
    Flow {
        state: FlowState::CLAIMED,
        seen_secs: maps.now_secs(),
        client: segment.src,
        frontend: segment.dst,
        backend: segment.dst,
        source,
        client_port: segment.src_port,
        frontend_port: segment.dst_port,
        backend_port: segment.dst_port,
        source_port: segment.src_port,
        flags: FlowFlags::MASQUERADE,
        proto: segment.proto,
        ..Flow::default()
    }
}

/// The start of a flow: everything but a proven source port.
#[inline(always)]
pub fn opening<F: Family>(
    maps: &impl Maps<F>,
    segment: &Segment<F::Addr>,
    chosen: &crate::select::Chosen<F::Addr>,
) -> Flow<F::Addr> {
    let is_hairpin = chosen.backend.addr == segment.src;
    let config = maps.config();
    Flow {
        state: FlowState::CLAIMED,
        seen_secs: maps.now_secs(),
        service: chosen.backend.service,
        backend_id: chosen.id,
        backend_generation: chosen.backend.generation,
        client: segment.src,
        frontend: segment.dst,
        backend: chosen.backend.addr,
        source: if is_hairpin {
            F::of(config.node4, config.node6)
        } else {
            segment.src
        },
        client_port: segment.src_port,
        frontend_port: segment.dst_port,
        backend_port: chosen.backend.port,
        source_port: segment.src_port,
        flags: if is_hairpin { FlowFlags::HAIRPIN } else { 0 },
        proto: segment.proto,
        fins: 0,
    }
}
