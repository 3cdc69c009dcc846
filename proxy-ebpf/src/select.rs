//! From a frontend to a backend: what socket and packet translation share.
//!
//! Invariant: what is returned was live when it was looked at; a client with affinity keeps its
//! backend while that is selected and the timeout has not passed.

use penstock_common::{
    Addr, Affinity, AffinityKey, Backend, BackendFlags, BackendId, Counter, Frontend,
    FrontendFlags, slot_at,
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

/// Whether a refusal is answered, or the packet vanishes.
#[inline(always)]
pub fn refusal(frontend: &Frontend) -> Counter {
    if frontend.flags & FrontendFlags::DROP_WHEN_EMPTY != 0 {
        Counter::NoLocalEndpoints
    } else {
        Counter::NoEndpoints
    }
}

/// A backend for a new flow or connection of `client`; the error says why there is none.
#[inline(always)]
pub fn backend<F: Family>(
    maps: &impl Maps<F>,
    frontend: &Frontend,
    client: F::Addr,
) -> Result<Chosen<F::Addr>, Counter> {
    if frontend.slots.count == 0 {
        return Err(refusal(frontend));
    }
    if frontend.affinity_secs == 0 {
        return random(maps, frontend);
    }
    let key = AffinityKey {
        service: frontend.service,
        client,
    };
    let now = maps.now_secs();
    let chosen = match bound(maps, frontend, &key, now) {
        Some(chosen) => chosen,
        None => random(maps, frontend)?,
    };
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
    key: &AffinityKey<F::Addr>,
    now: u32,
) -> Option<Chosen<F::Addr>> {
    let affinity = maps.affinity(key)?;
    if now.wrapping_sub(affinity.used_secs) >= frontend.affinity_secs {
        return None;
    }
    let backend = maps.backend(affinity.backend)?;
    backend
        .is(
            affinity.generation,
            BackendFlags::LIVE | BackendFlags::SELECTED,
        )
        .then_some(Chosen {
            id: affinity.backend,
            backend,
        })
}

/// Any backend, each with equal chance.
#[inline(always)]
fn random<F: Family>(maps: &impl Maps<F>, frontend: &Frontend) -> Result<Chosen<F::Addr>, Counter> {
    let slot = frontend
        .slots
        .base
        .wrapping_add(slot_at(maps.random(), frontend.slots.count));
    let id = maps.slot(slot).ok_or(Counter::BackendMissing)?;
    let backend = maps.backend(id).ok_or(Counter::BackendMissing)?;
    // A slot that names another service's backend can only be met while its block is recycled.
    if backend.service != frontend.service || backend.addr.is_unspecified() {
        return Err(Counter::BackendMissing);
    }
    Ok(Chosen { id, backend })
}
