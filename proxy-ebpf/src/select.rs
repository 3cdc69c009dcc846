//! From a frontend to a backend: what socket and packet translation share.
//!
//! Invariant: what is returned was live when it was looked at; a client with affinity keeps its
//! backend while that is selected and the timeout has not passed.

use penstock_common::{
    Addr, Affinity, AffinityKey, Backend, BackendFlags, BackendId, Counter, Frontend,
    FrontendFlags, SlotRange, SourceRange, client_hash, slot_at,
};

use crate::{env::Maps, family::Family};

/// A backend and the name of its present life.
#[derive(Clone, Copy)]
pub struct Chosen<A> {
    /// Its id.
    pub id: BackendId,
    /// The backend.
    pub backend: Backend<A>,
}

/// Where a client is, which decides who may serve it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// On a node, or in a pod.
    Cluster,
    /// Anywhere else.
    Outside,
}

/// The backends of a frontend that a client may get.
#[derive(Clone, Copy)]
pub struct Candidates {
    slots: SlotRange,
    /// [`BackendFlags`] that each has.
    flags: u32,
    /// What a client meets if there is none.
    refusal: Counter,
}

/// Who may serve clients of this origin.
#[inline(always)]
pub fn candidates(frontend: &Frontend, origin: Origin) -> Candidates {
    let (slots, local) = match origin {
        Origin::Cluster => (frontend.slots, FrontendFlags::LOCAL),
        Origin::Outside => (frontend.external, FrontendFlags::EXTERNAL_LOCAL),
    };
    let is_local = frontend.flags & local != 0;
    Candidates {
        slots,
        flags: if is_local {
            BackendFlags::LIVE | BackendFlags::LOCAL
        } else {
            BackendFlags::LIVE | BackendFlags::CLUSTER
        },
        refusal: if is_local && frontend.flags & FrontendFlags::DROP_WHEN_EMPTY != 0 {
            Counter::NoLocalEndpoints
        } else {
            Counter::NoEndpoints
        },
    }
}

/// A backend for a new flow or connection of `client`; the error says why there is none.
#[inline(always)]
pub fn backend<F: Family>(
    maps: &impl Maps<F>,
    frontend: &Frontend,
    origin: Origin,
    client: F::Addr,
) -> Result<Chosen<F::Addr>, Counter> {
    if frontend.flags & FrontendFlags::SOURCE_RANGES != 0
        && !maps.lets_in(&SourceRange {
            service: frontend.service,
            addr: client,
        })
    {
        return Err(Counter::SourceRefused);
    }
    let candidates = candidates(frontend, origin);
    if candidates.slots.count == 0 {
        return Err(candidates.refusal);
    }
    let key = AffinityKey {
        service: frontend.service,
        client,
    };
    let has_affinity = frontend.affinity_secs != 0;
    let now = if has_affinity { maps.now_secs() } else { 0 };
    let known = if has_affinity {
        bound(maps, frontend, candidates.flags, &key, now)
    } else {
        None
    };
    let chosen = match known {
        Some(chosen) => chosen,
        None => by_algorithm(maps, frontend, candidates.slots, &key.client)?,
    };
    if !has_affinity {
        return Ok(chosen);
    }
    let entry = Affinity {
        backend: chosen.id,
        generation: chosen.backend.generation,
        used_secs: now,
    };
    maps.set_affinity(&key, &entry);
    Ok(chosen)
}

/// The backend that the client is bound to.
#[inline(always)]
fn bound<F: Family>(
    maps: &impl Maps<F>,
    frontend: &Frontend,
    flags: u32,
    key: &AffinityKey<F::Addr>,
    now: u32,
) -> Option<Chosen<F::Addr>> {
    let affinity = maps.affinity(key)?;
    // Both are whole seconds: rather a part of one longer than shorter.
    if now.wrapping_sub(affinity.used_secs) > frontend.affinity_secs {
        return None;
    }
    let backend = maps.backend(affinity.backend)?;
    backend.is(affinity.generation, flags).then_some(Chosen {
        id: affinity.backend,
        backend,
    })
}

/// The backend whose turn it is, by the service's algorithm (`Algorithm`): chance, order, the
/// client's address or the lesser load names a slot.
#[inline(always)]
fn by_algorithm<F: Family>(
    maps: &impl Maps<F>,
    frontend: &Frontend,
    slots: SlotRange,
    client: &F::Addr,
) -> Result<Chosen<F::Addr>, Counter> {
    let index = if frontend.flags & FrontendFlags::BY_TURN != 0 {
        maps.turn(slots.base).checked_rem(slots.count).unwrap_or(0)
    } else if frontend.flags & FrontendFlags::BY_CLIENT != 0 {
        slot_at(client_hash(client), slots.count)
    } else {
        slot_at(maps.random(), slots.count)
    };
    let mut slot = slots.base.wrapping_add(index);
    if frontend.flags & FrontendFlags::BY_LOAD != 0 && slots.count > 1 {
        // Any other one.
        let step = 1 + slot_at(maps.random(), slots.count - 1);
        let other = index.wrapping_add(step).checked_rem(slots.count);
        slot = maps.lighter(slot, slots.base.wrapping_add(other.unwrap_or(0)));
    }
    let id = maps.slot(slot).ok_or(Counter::BackendMissing)?;
    let backend = maps.backend(id).ok_or(Counter::BackendMissing)?;
    // A slot that names another service's backend can only be met while its block is recycled.
    if backend.service != frontend.service || backend.addr.is_unspecified() {
        return Err(Counter::BackendMissing);
    }
    Ok(Chosen { id, backend })
}
