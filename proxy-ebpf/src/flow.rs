//! Conntrack: finds, creates, follows and retires the records of translated flows.
//!
//! Invariant: a record is reachable by both of its keys or on its way in or out; whoever moved its
//! state to `CLAIMED` or `RECLAIMING` is the only one to change anything but state and time.

use penstock_common::{
    Addr, BackendFlags, Be16, Counter, Fins, Flow, FlowFlags, FlowId, FlowKey, FlowState, Proto,
};

use crate::{
    env::{Maps, Record},
    family::Family,
    parse::{Segment, tcp},
};

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
    let id = maps.flow_id(key)?;
    let record = maps.record(id)?;
    let known = Known {
        id,
        record,
        state: record.state(),
        flags: record.flags(),
        other: record.key(key.direction ^ FlowKey::<F::Addr>::REPLY),
    };
    let is_live = matches!(
        known.state,
        FlowState::EMBRYONIC | FlowState::ESTABLISHED | FlowState::CLOSING
    );
    // Last, so that what was read before belongs to the same life of the record.
    (is_live && record.key(key.direction) == *key).then_some(known)
}

/// Whether a request may go on in this flow, or must begin a new one.
#[inline(always)]
pub fn may_continue<F: Family, M: Maps<F>>(
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
) -> bool {
    let is_opening =
        segment.proto == Proto::TCP && segment.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    if is_opening && is_ending(known) {
        return false;
    }
    // UDP never sticks to a dead backend, and neither does a handshake that nobody answered; an
    // established TCP connection ends by itself.
    if segment.proto == Proto::UDP || (is_opening && known.state == FlowState::EMBRYONIC) {
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
    segment.proto == Proto::TCP && segment.tcp_flags & agrees == agrees && is_ending(known)
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
    if known.state != FlowState::ESTABLISHED || before | own == Fins::CLIENT | Fins::BACKEND {
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
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    segment: &Segment<F::Addr>,
    is_reply: bool,
) {
    let state = known.state;
    let next = if segment.tcp_flags & tcp::RST != 0 {
        FlowState::CLOSING
    } else if segment.tcp_flags & tcp::FIN != 0 {
        finish(known, is_reply)
    } else if state == FlowState::EMBRYONIC && is_reply {
        FlowState::ESTABLISHED
    } else {
        state
    };
    if next != state {
        known.record.exchange_state(state, next);
    }
    let now = maps.now_secs();
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
        maps.unlink(&known.record.key(FlowKey::<F::Addr>::REQUEST));
        maps.unlink(&known.record.key(FlowKey::<F::Addr>::REPLY));
        maps.settle(known.id);
        // The id returns to nobody's list: eviction or the agent's sweep finds it.
        known.record.set_state(FlowState::FREE);
    }
}

/// Gives a new flow its record, a source that no other flow to its backend has, and both keys.
///
/// `flow.source` and `flow.source_port` are a wish; the port is another where it is taken, within
/// `ports`. Where `keep_port` is not set the wish is not even tried.
#[inline(always)]
pub fn create<F: Family, M: Maps<F>>(
    maps: &M,
    flow: Flow<F::Addr>,
    keep_port: bool,
    ports: (u16, u16),
) -> Result<(), Counter> {
    let (id, record) = claim(maps)?;
    record.store(&flow);
    if !link(maps, &flow.request_key(), id) {
        record.set_state(FlowState::FREE);
        return Err(Counter::FlowRace);
    }
    let mut reply = flow.reply_key();
    let is_kept = keep_port && link(maps, &reply, id);
    if !is_kept && !take_port::<F, M>(maps, id, record, &mut reply, ports) {
        return Err(Counter::NoSourcePort);
    }
    record.set_state(FlowState::EMBRYONIC);
    maps.count(Counter::FlowCreated);
    Ok(())
}

/// Finds a source port that no other flow to the backend has, and makes the reply's key lead to the
/// record. Without one the record is free again.
#[inline(always)]
fn take_port<F: Family, M: Maps<F>>(
    maps: &M,
    id: FlowId,
    record: M::Record,
    reply: &mut FlowKey<F::Addr>,
    (low, high): (u16, u16),
) -> bool {
    let span = u32::from(high - low) + 1;
    let mut tries = 0;
    while tries < maps.attempts() {
        let port = low + penstock_common::slot_at(maps.random(), span) as u16;
        reply.dst_port = Be16::from_host(port);
        record.set_source_port(reply.dst_port);
        if maps.link(reply, id) {
            return true;
        }
        tries += 1;
    }
    maps.unlink(&record.key(FlowKey::<F::Addr>::REQUEST));
    record.set_state(FlowState::FREE);
    false
}

/// Gives a flow that no packet has followed yet another source.
#[inline(always)]
pub fn disguise<F: Family, M: Maps<F>>(
    maps: &M,
    known: &Known<F::Addr, M::Record>,
    source: F::Addr,
    ports: (u16, u16),
) -> Result<(), Counter> {
    if !known
        .record
        .exchange_state(FlowState::EMBRYONIC, FlowState::CLAIMED)
    {
        return Err(Counter::FlowRace);
    }
    let mut reply = known.record.key(FlowKey::<F::Addr>::REPLY);
    maps.unlink(&reply);
    reply.dst = source;
    known
        .record
        .set_source(source, known.flags | FlowFlags::MASQUERADE);
    if !take_port::<F, M>(maps, known.id, known.record, &mut reply, ports) {
        return Err(Counter::NoSourcePort);
    }
    known.record.set_state(FlowState::EMBRYONIC);
    Ok(())
}

/// Makes a key lead to `id`, also where it leads to a record that is no longer the key's.
#[inline(always)]
fn link<F: Family, M: Maps<F>>(maps: &M, key: &FlowKey<F::Addr>, id: FlowId) -> bool {
    if maps.link(key, id) {
        return true;
    }
    let Some(record) = maps.flow_id(key).and_then(|other| maps.record(other)) else {
        return false;
    };
    if record.state() != FlowState::FREE && record.key(key.direction) == *key {
        return false;
    }
    maps.unlink(key);
    maps.link(key, id)
}

/// A record of this program's own, in state `CLAIMED`.
#[inline(always)]
fn claim<F: Family, M: Maps<F>>(maps: &M) -> Result<(FlowId, M::Record), Counter> {
    if let Some(id) = maps.pop_free()
        && let Some(record) = maps.record(id)
        && record.exchange_state(FlowState::FREE, FlowState::CLAIMED)
    {
        return Ok((id, record));
    }
    let now = maps.now_secs();
    let timeouts = maps.config().timeouts;
    let mut sample = 0;
    while sample < maps.attempts() {
        sample += 1;
        let id = FlowId(penstock_common::slot_at(maps.random(), maps.records()));
        let Some(record) = maps.record(id) else {
            continue;
        };
        let state = record.state();
        if !may_evict(state, record, now, &timeouts)
            || !record.exchange_state(state, FlowState::CLAIMED)
        {
            continue;
        }
        if state != FlowState::FREE {
            maps.unlink(&record.key(FlowKey::<F::Addr>::REQUEST));
            maps.unlink(&record.key(FlowKey::<F::Addr>::REPLY));
            maps.settle(id);
            maps.count(Counter::FlowEvicted);
        }
        return Ok((id, record));
    }
    Err(Counter::FlowTableFull)
}

/// Embryonic and closing flows go first, established ones only once they have expired; half of one is
/// as good as closing once it was idle for that long.
#[inline(always)]
fn may_evict<A: Addr>(
    state: u32,
    record: impl Record<A>,
    now: u32,
    timeouts: &penstock_common::Timeouts,
) -> bool {
    match state {
        FlowState::FREE | FlowState::EMBRYONIC | FlowState::CLOSING => true,
        FlowState::ESTABLISHED => {
            let (proto, seen_secs) = record.last_seen();
            let timeout = if proto == Proto::TCP && record.fins() != 0 {
                timeouts.tcp_closing_secs
            } else if proto == Proto::TCP {
                timeouts.tcp_established_secs
            } else {
                timeouts.udp_stream_secs
            };
            now.wrapping_sub(seen_secs) >= timeout
        }
        _ => false,
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
