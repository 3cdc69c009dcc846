//! Who dialled a pod at its own address, and by what way.
//!
//! A pod's packet to the outside gets this node's address if the pod began. What it answers to somebody
//! who dialled it keeps its own, and goes back by the way that the question came: past the kernel's stack,
//! or through it where somebody else's rules led the question to the pod and will undo that in the answer.
//! UDP does not say of a packet whether it begins something, and of a segment that does not begin a
//! connection nobody else knows which way its question came; so whoever is outside of the cluster and sends
//! something to a pod is remembered, by UDP for as long as a stream of it would be.

use penstock_common::{AddressKind, Counter, Dialled, FlowKey, NetworkFlags, Proto, ShortcutKind};

use crate::{
    env::{Env, Maps, Way},
    family::{ETHERNET, Family},
    flow,
    packet::Packet,
    parse::{self, Segment},
    pod::{self, Verdict},
};

/// How old a note grows before it is written anew, in seconds.
const FRESH_SECS: u32 = 1;

/// A packet that the kernel sends to a pod, after [`crate::pod::returning`], if anything of it
/// [`is_noted`].
#[inline(always)]
pub fn received<F: Family, M: Maps<F>>(
    packet: &mut impl Packet,
    maps: &M,
) -> Result<Verdict, Counter> {
    if let Some(ends) = parse::addrs::<F>(packet, ETHERNET)
        && !maps.is(&ends.0, AddressKind::NODE)
    {
        note::<F, M>(packet, maps, &ends, Dialled::BY_KERNEL);
    }
    Ok(Verdict::Pass)
}

/// A packet from elsewhere that this node hands to a pod itself, likewise. Where such packets go is noted for
/// those that follow, if nothing is to be remembered of who sends them.
#[inline(always)]
pub fn came<F: Family, M: Maps<F>>(packet: &mut impl Packet, maps: &M) -> Result<Verdict, Counter> {
    let Some(ends) = parse::addrs::<F>(packet, ETHERNET) else {
        return Ok(Verdict::Pass);
    };
    let changed = maps.changed();
    let is_done = !is_noted(maps, Dialled::PAST_KERNEL)
        || note::<F, M>(packet, maps, &ends, Dialled::PAST_KERNEL);
    if is_done && let Some(to) = maps.endpoint(&ends.1) {
        let way = Way {
            kind: ShortcutKind::POD,
            to,
            ..Way::default()
        };
        maps.note_way(changed, packet.ifindex(), &ends, &way);
    }
    Ok(Verdict::Pass)
}

/// Whether anything is remembered of who sends packets that come this way.
#[inline(always)]
pub fn is_noted(maps: &impl Env, way: u32) -> bool {
    let network = maps.network();
    let wanted = NetworkFlags::FORWARD | NetworkFlags::MASQUERADE;
    network & wanted == wanted || way == Dialled::BY_KERNEL && network & NetworkFlags::CHAINED != 0
}

/// Remembers who sends a packet to a pod of this node, if that is somebody outside; with
/// [`NetworkFlags::CHAINED`] whoever it is whose packet the kernel sends. Whether no packet with these ends has
/// to be looked at again.
#[inline(always)]
fn note<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    (src, dst): &(F::Addr, F::Addr),
    way: u32,
) -> bool {
    let is_chained = way == Dialled::BY_KERNEL && maps.network() & NetworkFlags::CHAINED != 0;
    let Some(header) = F::network(packet, ETHERNET) else {
        return false;
    };
    if !pod::is_translated(header.proto) || header.fragment.is_later {
        return false;
    }
    let Some((src_port, dst_port)) = parse::ports(packet, header.transport) else {
        return false;
    };
    let (pod, peer) = ((*dst, dst_port), (*src, src_port));
    let answer = FlowKey::new(FlowKey::<F::Addr>::REPLY, header.proto, pod, peer);
    let now = maps.now_secs();
    let is_fresh = |known: Dialled| known.way() == way && known.age(now) <= FRESH_SECS;
    if maps.dialled(&answer).is_some_and(is_fresh) {
        return false;
    }
    let is_inside = !is_chained
        && (maps.address(src).is_some()
            || maps.endpoint(src).is_some()
            || maps.route(src).is_some());
    if is_inside {
        return true;
    }
    // What the pod has asked for, and has been translated before.
    let question = FlowKey::new(FlowKey::<F::Addr>::REQUEST, header.proto, pod, peer);
    if flow::find::<F, M>(maps, &question).is_none() {
        maps.note_dialled(&answer, way);
    }
    false
}

/// By what way a pod's packet goes, as [`Dialled::way`], if it goes to somebody who dialled it.
#[inline(always)]
pub(crate) fn way_back<F: Family, M: Maps<F>>(maps: &M, segment: &Segment<F::Addr>) -> Option<u32> {
    let key = FlowKey::new(
        FlowKey::<F::Addr>::REPLY,
        segment.proto,
        (segment.src, segment.src_port),
        (segment.dst, segment.dst_port),
    );
    let known = maps.dialled(&key)?;
    let age = known.age(maps.now_secs());
    if segment.proto == Proto::UDP && age > maps.config().timeouts.udp_stream_secs {
        return None;
    }
    if age > FRESH_SECS {
        maps.note_dialled(&key, known.way());
    }
    Some(known.way())
}

/// Whether a pod's packet is an answer that the kernel has to see, where somebody else translates what comes to
/// pods.
#[inline(always)]
pub(crate) fn is_kernels<F: Family, M: Maps<F>>(
    packet: &impl Packet,
    maps: &M,
    ends: &(F::Addr, F::Addr),
) -> bool {
    let Some(header) = F::network(packet, ETHERNET) else {
        return false;
    };
    if !pod::is_translated(header.proto) {
        return false;
    }
    let Ok(segment) = parse::segment::<F>(packet, maps, ETHERNET, &header, *ends) else {
        return false;
    };
    if way_back::<F, M>(maps, &segment) != Some(Dialled::BY_KERNEL) {
        return false;
    }
    parse::remember_ports::<F>(maps, &header, &segment);
    true
}
