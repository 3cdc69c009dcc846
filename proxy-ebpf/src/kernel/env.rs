//! [`Env`] and [`Maps`] by way of the kernel's helpers.
#![expect(unsafe_code, reason = "map elements are shared memory")]

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd, atomic_xchg},
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
    maps::lpm_trie::Key,
};
use penstock_common::{
    Addr, Address, Affinity, AffinityKey, Backend, BackendCounts, BackendId, BackendLife, Config,
    Counter, Dialled, Endpoint, FilterBit, FlowCounts, FlowId, FlowKey, FragmentKey, FragmentPorts,
    Frontend, FrontendKey, HintPlace, Hints, Hop, Load, NetworkFlags, Plain, PortChunk, Proto,
    Responder, Route, ServiceId, Shortcut, SourceRange, Traffic, Uplink, V4, V6, Vtep, XdpUplink,
    limits,
};
use penstock_ebpf::{
    env::{Env, Maps, NextHop, Overlay, Way},
    pod::{Back, QUOTING, decode_back},
    quoted::Quote,
};

use super::{
    maps::*,
    record::RecordPtr,
    routes::{self, Hook},
    shortcuts,
};
use crate::programs::{
    flows::{evict_port4, evict_port6, evict4, evict6, succeed4, succeed6, take_port4, take_port6},
    shared::{about_request4, about_request6, back4, back6, quote4, quote6, requote4, requote6},
};

/// ICMP errors that one CPU sends in a second at most; the kernel's own global limit is the same
/// (icmp_msgs_per_sec).
const ERRORS_PER_SECOND: u32 = 1_000;

/// A constant that the verifier knows and the compiler does not, lest it unroll the loops.
#[unsafe(no_mangle)]
static ATTEMPTS: Global<u32> = Global::new(8);

/// The same: how many records are looked at in one go.
#[unsafe(no_mangle)]
static REACH: Global<u32> = Global::new(64);

/// How many flows of one family the maps were made for.
#[unsafe(no_mangle)]
static RECORDS: Global<u32> = Global::new(limits::FLOWS);

/// The bits that their ids take.
#[unsafe(no_mangle)]
static IDS: Global<u32> = Global::new(Hints::ids(limits::FLOWS));

/// The kernel, on behalf of the program that runs in `context`.
pub(crate) struct Kernel<'a, C> {
    /// What traces are sent with.
    pub(crate) context: &'a C,
}

/// A copy of a map element.
///
/// RCU keeps the element mapped until the program returns, but not its content: the agent may
/// rewrite or recycle it meanwhile. Hence one volatile copy, of a type that any bytes are.
#[inline(always)]
pub(super) fn copy<T: Plain>(element: *const T) -> T {
    // SAFETY: `element` came from a map look-up of this program run, so it points to a mapped
    // element of the map's value type; `T: Plain` makes any bytes valid.
    unsafe { element.read_volatile() }
}

/// Adds to the replies that are counted with this key, if it is one's.
#[inline(always)]
fn count_responder<A: Addr>(key: &FlowKey<A>, change: u64) {
    if key.direction != FlowKey::<A>::REPLY {
        return;
    }
    if let Some(count) = RESPONDERS.get_ptr_mut(key.responder().0) {
        add(count, change);
    }
}

/// [`Env::turn`], a function of its own: where it is called from, stacks have no room.
#[inline(never)]
fn take_turn(block: u32) -> u32 {
    match TURNS.get_ptr_mut(block) {
        // SAFETY: a mapped element (see `copy`), an aligned word that everybody changes
        // atomically. One that is recycled meanwhile moves another block's turn on by one. Of a
        // relaxed addition LLVM's BPF target forgets the result.
        Some(turn) => unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(turn, 1) },
        None => {
            // Blocks are replaced when endpoints change, and nobody is to be first each time.
            // SAFETY: the helper takes no argument.
            let first = unsafe { bpf_get_prandom_u32() } >> 1;
            // A full LRU map makes room; an error means contention, and somebody else's is in.
            let _ = TURNS.insert(block, first + 1, 0);
            first
        }
    }
}

impl<C: EbpfContext> Env for Kernel<'_, C> {
    #[inline(always)]
    fn now_secs(&self) -> u32 {
        // SAFETY: the helper takes no argument.
        let nanos = unsafe { bpf_ktime_get_coarse_ns() };
        (nanos / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no argument.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn turn(&self, block: u32) -> u32 {
        take_turn(block)
    }

    #[inline(always)]
    fn config(&self) -> Config {
        CONFIG.get_ptr(0).map(copy).unwrap_or_default()
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<Uplink> {
        UPLINKS.get_ptr(ifindex).map(copy)
    }

    #[inline(always)]
    fn xdp_uplink(&self, ifindex: u32) -> Option<XdpUplink> {
        XDP_UPLINKS.get_ptr(ifindex).map(copy)
    }

    #[inline(always)]
    fn is_vtep(&self, vtep: &Vtep) -> bool {
        VTEPS.get_ptr(vtep).is_some()
    }

    #[inline(always)]
    fn network(&self) -> u32 {
        // SAFETY: a field's address inside the mapped element; nothing is read.
        let field = |config: *const Config| unsafe { addr_of!((*config).network) };
        CONFIG.get_ptr(0).map(field).map(copy).unwrap_or_default()
    }

    #[inline(always)]
    fn is_held(&self, ifindex: u32) -> bool {
        self.network() & NetworkFlags::HELD != 0 && HELD.get_ptr(ifindex).is_some()
    }

    #[inline(always)]
    fn changed(&self) -> u64 {
        CHANGED.get_ptr(0).map(copy).unwrap_or_default()
    }

    #[inline(always)]
    fn overlay(&self) -> Overlay {
        let Some(config) = CONFIG.get_ptr(0) else {
            return Overlay::default();
        };
        // SAFETY: fields' addresses inside the mapped element; nothing is read.
        let fields = unsafe {
            (
                addr_of!((*config).overlay_ifindex),
                addr_of!((*config).overlay_mtu),
                addr_of!((*config).overlay_vni),
                addr_of!((*config).overlay_port),
            )
        };
        Overlay {
            ifindex: copy(fields.0),
            mtu: copy(fields.1),
            vni: copy(fields.2),
            port: copy(fields.3),
        }
    }

    #[inline(always)]
    fn count(&self, counter: Counter) {
        if let Some(count) = COUNTERS.get_ptr_mut(counter as u32) {
            // SAFETY: the element is this CPU's, and programs of one hook do not interrupt each
            // other; a count that another hook's program interrupts may be lost, which is all.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn attempts(&self) -> u32 {
        ATTEMPTS.load()
    }

    #[inline(always)]
    fn reach(&self) -> u32 {
        REACH.load()
    }

    #[inline(always)]
    fn may_respond(&self, responder: Responder) -> bool {
        RESPONDERS
            .get_ptr(responder.0)
            .map(copy)
            .unwrap_or_default()
            != 0
    }

    #[inline(always)]
    fn port_chunk(&self, index: u32) -> PortChunk {
        PORT_CHUNKS.get_ptr(index).map(copy).unwrap_or_default()
    }

    #[inline(always)]
    fn count_port_end(&self, index: u32) {
        if let Some(chunk) = PORT_CHUNKS.get_ptr_mut(index) {
            // SAFETY: a mapped array element, whose first field is an aligned word that everybody
            // changes atomically.
            unsafe {
                atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(addr_of_mut!((*chunk).ended), 1)
            };
        }
    }

    #[inline(always)]
    fn set_full(&self, index: u32, full: u64) {
        if let Some(chunk) = PORT_CHUNKS.get_ptr_mut(index) {
            // SAFETY: a mapped array element; an aligned word is written whole.
            unsafe { addr_of_mut!((*chunk).full).write_volatile(full) };
        }
    }

    #[inline(always)]
    fn stamp(&self) -> u32 {
        OPENING_STAMP.get_ptr(0).map(copy).unwrap_or_default()
    }

    #[inline(always)]
    fn set_stamp(&self, stamp: u32) {
        if let Some(element) = OPENING_STAMP.get_ptr_mut(0) {
            // SAFETY: this CPU's element, see `count`; an aligned word is written whole.
            unsafe { element.write_volatile(stamp) };
        }
    }

    #[inline(always)]
    fn may_send_error(&self) -> bool {
        let now = self.now_secs();
        let Some(sent) = ERRORS_SENT.get_ptr_mut(0) else {
            return false;
        };
        // SAFETY: this CPU's element, see `count`.
        let [second, count] = unsafe { sent.read_volatile() };
        let count = if second == now { count } else { 0 };
        if count >= ERRORS_PER_SECOND {
            return false;
        }
        // SAFETY: as above.
        unsafe { sent.write_volatile([now, count + 1]) };
        true
    }

    #[inline(always)]
    fn trace(&self, counter: Counter, proto: Proto, port: u16) {
        self.trace_index(counter as u32, proto, port);
    }
}

impl<C: EbpfContext> Kernel<'_, C> {
    /// [`Env::trace`] of the counter with an index.
    #[inline(always)]
    pub(crate) fn trace_index(&self, counter: u32, proto: Proto, port: u16) {
        aya_log_ebpf::debug!(
            self.context,
            "counter {} protocol {} port {}",
            counter,
            proto.0,
            port
        );
    }
}

/// Adds to a number that others add to meanwhile.
#[inline(always)]
fn add(number: *mut u64, value: u64) {
    // SAFETY: the callers' pointers are to aligned fields of mapped elements (see `copy`) that
    // programs only ever change atomically.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(number, value) };
}

/// [`add`] of a number of a flow that this program ended, or of none where there is nothing to add it
/// to, and zero in its place.
///
/// A packet of that flow that another CPU has in hands may still be added to it, and is lost.
#[inline(always)]
fn move_to(number: Option<*mut u64>, ended: *mut u64) {
    // SAFETY: as in `add`.
    let value = unsafe { ended.read_volatile() };
    // SAFETY: as in `add`.
    unsafe { ended.write_volatile(0) };
    if let Some(number) = number {
        add(number, value);
    }
}

/// [`move_to`] for both numbers of what went one way.
#[inline(always)]
fn move_traffic(sum: Option<*mut Traffic>, ended: *mut Traffic) {
    // SAFETY: fields' addresses inside mapped elements; nothing is read.
    unsafe {
        move_to(
            sum.map(|sum| addr_of_mut!((*sum).packets)),
            addr_of_mut!((*ended).packets),
        );
        move_to(
            sum.map(|sum| addr_of_mut!((*sum).bytes)),
            addr_of_mut!((*ended).bytes),
        );
    }
}

/// Where a flow's packets of a direction go.
#[inline(always)]
fn hop_of(counts: *mut FlowCounts, is_reply: bool) -> *mut Hop {
    // SAFETY: fields' addresses inside the mapped element; nothing is read.
    unsafe {
        if is_reply {
            addr_of_mut!((*counts).reply_hop)
        } else {
            addr_of_mut!((*counts).request_hop)
        }
    }
}

/// What a backend's counts begin with: where an insertion gets it from, stacks having no room.
static NOTHING: BackendCounts = BackendCounts::new(ServiceId(0));

macro_rules! family {
    ($family:ty, $counts_of:ident, $begin_life:ident, $settle:ident, $load_of:ident, $lighter:ident, $back:ident, $about:ident, $quote:ident, $requote:ident, $evict:ident, $take_port:ident, $evict_port:ident, $succeed:ident: $addresses:ident, $filter:ident, $frontends:ident, $backends:ident, $affinity:ident,
        $index:ident, $flows:ident, $vteps:ident, $counts:ident, $connections:ident, $loads:ident, $backend_counts:ident, $free:ident, $fragments:ident, $dialled:ident, $endpoints:ident, $routes:ident,
        $source_ranges:ident, $openings:ident, $hands:ident, $shortcuts:ident, $hints:ident, $node:ident, $overlay:ident) => {
        /// The counts of a backend's life, which begin if need be; none without room for them.
        #[inline(always)]
        fn $counts_of(life: &BackendLife, service: ServiceId) -> Option<*mut BackendCounts> {
            if let Some(counts) = $backend_counts.get_ptr_mut(life) {
                return Some(counts);
            }
            // Whoever else begins them writes the same.
            let _ = $backend_counts.insert(life, &NOTHING, u64::from(BPF_NOEXIST));
            let counts = $backend_counts.get_ptr_mut(life)?;
            // SAFETY: a field of a mapped element (see `copy`).
            unsafe { addr_of_mut!((*counts).service).write_volatile(service) };
            Some(counts)
        }

        /// Begins a life of a backend's id, a function of its own, see [`take_turn`].
        #[inline(never)]
        fn $begin_life(backend: u32, generation: u32, service: u32) {
            let Some(connections) = $connections.get_ptr_mut(backend) else {
                return;
            };
            // SAFETY: fields' addresses inside the mapped element; nothing is read.
            let (before, owner, count) = unsafe {
                (
                    addr_of_mut!((*connections).generation),
                    addr_of_mut!((*connections).service),
                    addr_of_mut!((*connections).count),
                )
            };
            let life = BackendLife {
                backend: BackendId(backend),
                generation: copy(before),
                author: BackendLife::PROGRAMS,
            };
            if (generation.wrapping_sub(life.generation) as i32) <= 0 {
                // Of a life that is over, or somebody else has begun this one.
                return;
            }
            let last_owner = copy(owner);
            // SAFETY: an aligned word that everybody changes atomically.
            let is_mine = unsafe {
                atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                    before,
                    life.generation,
                    generation,
                )
                .1
            };
            if !is_mine {
                return;
            }
            // SAFETY: as above, and a word that only who begins a life writes.
            let last = unsafe {
                owner.write_volatile(ServiceId(service));
                atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(count, 0)
            };
            if last != 0
                && let Some(counts) = $counts_of(&life, last_owner)
            {
                // SAFETY: a field's address inside the mapped element; nothing is read.
                add(unsafe { addr_of_mut!((*counts).connections) }, last);
            }
        }

        /// How many connections a slot's backend has, and its weight.
        #[inline(always)]
        fn $load_of(slot: u32) -> Option<(u32, u32)> {
            let id = SLOTS.get_ptr(slot).map(copy)?;
            let backend = $backends.get_ptr(id.0).map(copy)?;
            let connections = $connections.get_ptr(id.0).map(copy)?;
            let given = if connections.generation == backend.generation {
                connections.count
            } else {
                0
            };
            let seen = $loads.get_ptr(id).map(copy);
            let load = Load::now(seen, backend.generation, given);
            Some((load, backend.weight()))
        }

        /// [`Maps::lighter`], a function of its own, see [`take_turn`].
        #[inline(never)]
        fn $lighter(first: u32, second: u32) -> u32 {
            match ($load_of(first), $load_of(second)) {
                (Some(load), Some(other)) if Load::is_second_lighter(load, other) => second,
                _ => first,
            }
        }

        /// [`Maps::settle`], a function of its own, see [`take_turn`].
        #[inline(never)]
        fn $settle(id: u32) {
            let Some(flow) = $flows.get_ptr(id) else {
                return;
            };
            // SAFETY: fields' addresses inside the mapped element; nothing is read.
            let (backend, generation, service) = unsafe {
                (
                    copy(addr_of!((*flow).backend_id)),
                    copy(addr_of!((*flow).backend_generation)),
                    copy(addr_of!((*flow).service)),
                )
            };
            let life = BackendLife {
                backend,
                generation,
                author: BackendLife::PROGRAMS,
            };
            // What was masqueraded has no backend.
            let counts = if generation == 0 {
                None
            } else {
                $counts_of(&life, service)
            };
            let Some(ended) = $counts.get_ptr_mut(id) else {
                return;
            };
            // SAFETY: fields' addresses inside mapped elements, and one that only who ends a flow
            // clears.
            unsafe {
                addr_of_mut!((*ended).last_stamp).write_volatile(0);
                move_traffic(
                    counts.map(|counts| addr_of_mut!((*counts).request)),
                    addr_of_mut!((*ended).request),
                );
                move_traffic(
                    counts.map(|counts| addr_of_mut!((*counts).reply)),
                    addr_of_mut!((*ended).reply),
                );
            }
        }

        impl<C: Hook> Maps<$family> for Kernel<'_, C> {
            type Record = RecordPtr<$family>;

            #[inline(always)]
            fn back(&self) -> Result<Back, Counter> {
                let mut number = $back(self.context.as_ptr().cast());
                // Decoded once: of a value that is one or the other LLVM makes reads of what is neither.
                if number == QUOTING {
                    number = $about(self.context.as_ptr().cast());
                }
                decode_back(number)
            }

            #[inline(always)]
            fn quote(&self) -> Option<Quote> {
                Quote::from_bits($quote(self.context.as_ptr().cast()))
            }

            #[inline(always)]
            fn requote(&self, quote: Quote, id: FlowId, is_about_request: bool) -> bool {
                let context = self.context.as_ptr().cast();
                $requote(context, quote.to_bits(), id.0, is_about_request.into()) != 0
            }

            #[inline(always)]
            fn evict(&self, id: FlowId) -> bool {
                $evict(id.0) != 0
            }

            #[inline(always)]
            fn take_port(&self, id: FlowId, port: u16) -> bool {
                $take_port(id.0, port.into()) != 0
            }

            #[inline(always)]
            fn evict_port(&self, id: FlowId, port: u16) -> bool {
                $evict_port(id.0, port.into()) != 0
            }

            #[inline(always)]
            fn succeed(&self, id: FlowId, port: u16) -> bool {
                $succeed(id.0, port.into()) != 0
            }

            #[inline(always)]
            fn node(&self) -> $family {
                // SAFETY: a field's address inside the mapped element; nothing is read.
                let field = |config: *const Config| unsafe { addr_of!((*config).$node) };
                CONFIG.get_ptr(0).map(field).map(copy).unwrap_or_default()
            }

            #[inline(always)]
            fn overlay_addr(&self) -> $family {
                // SAFETY: a field's address inside the mapped element; nothing is read.
                let field = |config: *const Config| unsafe { addr_of!((*config).$overlay) };
                CONFIG.get_ptr(0).map(field).map(copy).unwrap_or_default()
            }

            #[inline(always)]
            fn may_be_known(&self, addr: &$family) -> bool {
                let bit = FilterBit::of(*addr);
                let bits = $filter.get_ptr(bit.element()).map(copy);
                bits.unwrap_or_default() & bit.mask() != 0
            }

            #[inline(always)]
            fn address(&self, addr: &$family) -> Option<Address> {
                if !Maps::<$family>::may_be_known(self, addr) {
                    return None;
                }
                $addresses.get_ptr(addr).map(copy)
            }

            #[inline(always)]
            fn frontend(&self, key: &FrontendKey<$family>) -> Option<Frontend> {
                let frontend = $frontends.get_ptr(key).map(copy)?;
                (frontend.key_check == key.check()).then_some(frontend)
            }

            #[inline(always)]
            fn slot(&self, slot: u32) -> Option<BackendId> {
                SLOTS.get_ptr(slot).map(copy)
            }

            #[inline(always)]
            fn backend(&self, id: BackendId) -> Option<Backend<$family>> {
                $backends.get_ptr(id.0).map(copy)
            }

            #[inline(always)]
            fn lighter(&self, first: u32, second: u32) -> u32 {
                $lighter(first, second)
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$family>) -> Option<Affinity> {
                $affinity.get_ptr(key).map(copy)
            }

            #[inline(always)]
            fn set_affinity(&self, key: &AffinityKey<$family>, affinity: &Affinity) {
                // An element that exists is written in place: an insert costs six look-ups.
                match $affinity.get_ptr_mut(key) {
                    // SAFETY: see `copy`; a torn entry names a backend whose generation and
                    // service are compared before it is believed.
                    Some(entry) => unsafe { entry.write_volatile(*affinity) },
                    // A full LRU map makes room; an error means contention, and the client is
                    // bound by its next connection.
                    None => {
                        let _ = $affinity.insert(key, affinity, 0);
                    }
                }
            }

            #[inline(always)]
            fn flow_id(&self, key: &FlowKey<$family>) -> Option<FlowId> {
                $index.get_ptr(key).map(copy)
            }

            #[inline(always)]
            fn record(&self, id: FlowId) -> Option<Self::Record> {
                $flows.get_ptr_mut(id.0).map(RecordPtr)
            }

            #[inline(always)]
            fn flow_vtep(&self, id: FlowId) -> Vtep {
                $vteps.get_ptr(id.0).map(copy).unwrap_or_default()
            }

            #[inline(always)]
            fn set_flow_vtep(&self, id: FlowId, vtep: &Vtep) {
                let Some(element) = $vteps.get_ptr_mut(id.0) else {
                    return;
                };
                // Another node's packets of the same flow are rare, and writing for each is not free.
                if copy(element) != *vtep {
                    // SAFETY: a mapped array element; one that is read while two write to it names no
                    // node, and one reply is lost.
                    unsafe { element.write_volatile(*vtep) };
                }
            }

            #[inline(always)]
            fn count_packet(&self, id: FlowId, is_reply: bool, bytes: u32) -> bool {
                let Some(counts) = $counts.get_ptr_mut(id.0) else {
                    return false;
                };
                // SAFETY: fields of a mapped element (see `copy`), a cache line for each direction.
                // Not atomic, which would cost more than the rest: of a direction's packets that two
                // CPUs have in hands in the same nanosecond one may not be counted.
                unsafe {
                    let way = if is_reply {
                        addr_of_mut!((*counts).reply)
                    } else {
                        addr_of_mut!((*counts).request)
                    };
                    let before = addr_of!((*way).packets).read_volatile();
                    addr_of_mut!((*way).packets).write_volatile(before + 1);
                    let sum = addr_of!((*way).bytes).read_volatile() + u64::from(bytes);
                    addr_of_mut!((*way).bytes).write_volatile(sum);
                    before == 0
                }
            }

            #[inline(always)]
            fn hints(&self, place: HintPlace) -> Hints {
                $hints.get_ptr(place.index).map(copy).unwrap_or_default()
            }

            #[inline(always)]
            fn set_hints(&self, place: HintPlace, hints: Hints) {
                if let Some(element) = $hints.get_ptr_mut(place.index) {
                    // SAFETY: a mapped array element (see `copy`); of one that two write at once each
                    // hint is one of theirs, or is found to lead to another flow's record.
                    unsafe { element.write_volatile(hints) };
                }
            }

            #[inline(always)]
            fn has_counted(&self, id: FlowId, is_reply: bool) -> bool {
                let Some(counts) = $counts.get_ptr_mut(id.0) else {
                    return false;
                };
                // SAFETY: fields of a mapped element (see `copy`).
                unsafe {
                    let way = if is_reply {
                        addr_of!((*counts).reply)
                    } else {
                        addr_of!((*counts).request)
                    };
                    addr_of!((*way).packets).read_volatile() != 0
                }
            }

            #[inline(always)]
            fn hop(&self, id: FlowId, is_reply: bool) -> Hop {
                $counts
                    .get_ptr_mut(id.0)
                    .map(|counts| copy(hop_of(counts, is_reply)))
                    .unwrap_or_default()
            }

            #[inline(always)]
            fn set_hop(&self, id: FlowId, is_reply: bool, hop: &Hop) {
                if let Some(counts) = $counts.get_ptr_mut(id.0) {
                    // SAFETY: a field of a mapped element (see `copy`); whoever reads half of it sees
                    // that.
                    unsafe { hop_of(counts, is_reply).write_volatile(*hop) };
                }
            }

            #[inline(always)]
            fn last_stamp(&self, id: FlowId) -> u32 {
                // SAFETY: a field's address inside the mapped element; nothing is read.
                let field = |counts: *const FlowCounts| unsafe { addr_of!((*counts).last_stamp) };
                $counts
                    .get_ptr(id.0)
                    .map(field)
                    .map(copy)
                    .unwrap_or_default()
            }

            #[inline(always)]
            fn set_last_stamp(&self, id: FlowId, stamp: u32) {
                if let Some(counts) = $counts.get_ptr_mut(id.0) {
                    // SAFETY: an aligned field of a mapped element (see `copy`), written whole.
                    unsafe { addr_of_mut!((*counts).last_stamp).write_volatile(stamp) };
                }
            }

            #[inline(always)]
            fn count_connection(&self, id: BackendId, generation: u32, service: ServiceId) {
                let Some(connections) = $connections.get_ptr_mut(id.0) else {
                    return;
                };
                // SAFETY: fields' addresses inside the mapped element; nothing is read.
                let (present, count) = unsafe {
                    (
                        addr_of!((*connections).generation),
                        addr_of_mut!((*connections).count),
                    )
                };
                if copy(present) != generation {
                    $begin_life(id.0, generation, service.0);
                    if copy(present) != generation {
                        return;
                    }
                }
                add(count, 1);
            }

            #[inline(always)]
            fn settle(&self, id: FlowId) {
                $settle(id.0);
            }

            #[inline(always)]
            fn link(&self, key: &FlowKey<$family>, id: FlowId) -> bool {
                // Before, so that whoever finds the key has found it counted.
                count_responder(key, 1);
                let is_new = $index.insert(key, id, u64::from(BPF_NOEXIST)).is_ok();
                if !is_new {
                    count_responder(key, 1_u64.wrapping_neg());
                }
                is_new
            }

            #[inline(always)]
            fn unlink(&self, key: &FlowKey<$family>) {
                // Absent is as good as removed, but counted by whoever did.
                if $index.remove(key).is_ok() {
                    count_responder(key, 1_u64.wrapping_neg());
                }
            }

            #[inline(always)]
            fn pop_free(&self) -> Option<FlowId> {
                $free.pop().ok().flatten()
            }

            #[inline(always)]
            fn relink(&self, key: &FlowKey<$family>, id: FlowId) {
                // The key is there, and counted; without memory its record is found to be another's.
                let _ = $index.insert(key, id, u64::from(BPF_EXIST));
            }

            #[inline(always)]
            fn opening(&self) -> Option<Self::Record> {
                $openings.get_ptr_mut(0).map(RecordPtr)
            }

            #[inline(always)]
            fn push_free(&self, id: FlowId) {
                // Full: the record is found by the hand.
                let _ = $free.push(id, 0);
            }

            #[inline(always)]
            fn hand(&self) -> u32 {
                $hands.get_ptr(0).map(copy).unwrap_or_default()
            }

            #[inline(always)]
            fn move_hand(&self, hand: u32) {
                let Some(element) = $hands.get_ptr_mut(0) else {
                    return;
                };
                let mut tries = 0;
                while tries < self.attempts() {
                    tries += 1;
                    let now = copy(element);
                    if hand.wrapping_sub(now) as i32 <= 0 {
                        return;
                    }
                    // SAFETY: a mapped array element, an aligned word that everybody changes
                    // atomically.
                    let is_moved = unsafe {
                        atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                            element, now, hand,
                        )
                        .1
                    };
                    if is_moved {
                        return;
                    }
                }
            }

            #[inline(always)]
            fn ids(&self) -> u32 {
                IDS.load()
            }

            #[inline(always)]
            fn records(&self) -> u32 {
                RECORDS.load()
            }

            #[inline(always)]
            fn endpoint(&self, addr: &$family) -> Option<Endpoint> {
                $endpoints.get_ptr(addr).map(copy)
            }

            #[inline(always)]
            fn way(&self, ifindex: u32, (src, dst): &($family, $family)) -> Option<Way> {
                let place = $shortcuts.get_ptr(Shortcut::index(ifindex, *src, *dst))?;
                shortcuts::recall(self, place, ifindex, src, dst)
            }

            #[inline(always)]
            fn note_way(
                &self,
                changed: u64,
                ifindex: u32,
                (src, dst): &($family, $family),
                way: &Way,
            ) {
                let index = Shortcut::index(ifindex, *src, *dst);
                if let Some(place) = $shortcuts.get_ptr_mut(index) {
                    shortcuts::note(self, place, changed, ifindex, src, dst, way);
                }
            }

            #[inline(always)]
            fn egress(&self, ingress: u32, src: &$family, dst: &$family) -> Option<u32> {
                routes::egress(self.context, ingress, *src, *dst)
            }

            #[inline(always)]
            fn egress_anyway(&self, ingress: u32, src: &$family, dst: &$family) -> Option<u32> {
                routes::egress_anyway(self.context, ingress, *src, *dst)
            }

            #[inline(always)]
            fn way_mtu(&self, ingress: u32, src: &$family, dst: &$family) -> u32 {
                routes::mtu(self.context, ingress, *src, *dst)
            }

            #[inline(always)]
            fn next_hop(&self, ingress: u32, src: &$family, dst: &$family) -> Option<NextHop> {
                routes::next_hop(self.context, ingress, *src, *dst)
            }

            #[inline(always)]
            fn tunnel_hop(&self, ingress: u32, to: V4) -> Option<NextHop> {
                routes::next_hop(self.context, ingress, Maps::<V4>::node(self), to)
            }

            #[inline(always)]
            fn route(&self, addr: &$family) -> Option<Route> {
                let bits = (size_of::<$family>() * 8) as u32;
                $routes.get(Key::new(bits, *addr)).map(|route| copy(route))
            }

            #[inline(always)]
            fn lets_in(&self, client: &SourceRange<$family>) -> bool {
                let bits = (size_of::<SourceRange<$family>>() * 8) as u32;
                $source_ranges.get(Key::new(bits, *client)).is_some()
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$family>) -> Option<FragmentPorts> {
                $fragments.get_ptr(key).map(copy)
            }

            #[inline(always)]
            fn set_fragment(&self, key: &FragmentKey<$family>, ports: &FragmentPorts) {
                // Without room the later fragments are counted as unmatched.
                let _ = $fragments.insert(key, ports, 0);
            }

            #[inline(always)]
            fn dialled(&self, answer: &FlowKey<$family>) -> Option<Dialled> {
                $dialled.get_ptr(answer).map(copy)
            }

            #[inline(always)]
            fn note_dialled(&self, answer: &FlowKey<$family>, way: u32) {
                let now = Dialled::new(self.now_secs(), way);
                match $dialled.get_ptr_mut(answer) {
                    // SAFETY: an aligned word of a mapped element (see `copy`), written whole.
                    Some(known) => unsafe { known.write_volatile(now) },
                    // A full LRU map makes room.
                    None => {
                        let _ = $dialled.insert(answer, &now, 0);
                    }
                }
            }
        }
    };
}

family!(V4, counts_of4, begin_life4, settle4, load_of4, lighter4, back4, about_request4, quote4, requote4, evict4, take_port4, evict_port4, succeed4: ADDRESSES4, ADDRESS_FILTER4, FRONTENDS4, BACKENDS4, AFFINITY4, FLOW_INDEX4, FLOWS4, FLOW_VTEPS4, FLOW_COUNTS4, CONNECTIONS4, LOADS4, BACKEND_COUNTS4, FREE_FLOWS4, FRAGMENTS4, DIALLED4, ENDPOINTS4, ROUTES4,
    SOURCE_RANGES4, OPENINGS4, HANDS4, SHORTCUTS4, HINTS4, node4, overlay4);
family!(V6, counts_of6, begin_life6, settle6, load_of6, lighter6, back6, about_request6, quote6, requote6, evict6, take_port6, evict_port6, succeed6: ADDRESSES6, ADDRESS_FILTER6, FRONTENDS6, BACKENDS6, AFFINITY6, FLOW_INDEX6, FLOWS6, FLOW_VTEPS6, FLOW_COUNTS6, CONNECTIONS6, LOADS6, BACKEND_COUNTS6, FREE_FLOWS6, FRAGMENTS6, DIALLED6, ENDPOINTS6, ROUTES6,
    SOURCE_RANGES6, OPENINGS6, HANDS6, SHORTCUTS6, HINTS6, node6, overlay6);
