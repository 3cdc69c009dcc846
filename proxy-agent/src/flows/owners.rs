//! Whose what clients dial is by now: for flows, and for connected UDP sockets, that were given a backend
//! by whoever had it before.
//!
//! Asked by sweeps and passes, and never for a packet: who a frontend belongs to is written by this agent.

use std::{
    collections::{HashMap as Map, HashSet},
    hash::Hash,
    os::fd::AsFd,
};

use aya::maps::{HashMap, Map as AnyMap, MapData};
use penstock_common::{
    Addr, Backend, BackendFlags, Be16, Flow, FlowState, Frontend, FrontendKey, Plain, ServiceId,
};

use crate::dataplane::{
    batch,
    pins::{PinError, Pins},
};

/// Backends that are read at once.
const CHUNK: usize = 65_536;

/// A family's frontends and backends, as the kernel has them.
pub(crate) struct Owners<A: Addr> {
    frontends: HashMap<MapData, FrontendKey<A>, Frontend>,
    backends: MapData,
}

impl<A: Addr + Hash> Owners<A>
where
    FrontendKey<A>: aya::Pod,
    Backend<A>: Plain + Default,
{
    /// Opens the pinned maps.
    pub(crate) fn open(
        pins: &Pins,
        [frontends, backends]: [&'static str; 2],
    ) -> Result<Self, PinError> {
        Ok(Self {
            frontends: HashMap::try_from(AnyMap::HashMap(pins.map(frontends)?))
                .map_err(|_| PinError::Missing { name: frontends })?,
            backends: pins.map(backends)?,
        })
    }

    /// Begins a round of questions, which asks the kernel for each thing once.
    pub(crate) fn ask(&self) -> Asked<'_, A> {
        Asked {
            owners: self,
            of: Map::new(),
            serving: None,
        }
    }

    fn serving(&self) -> HashSet<(ServiceId, A, Be16)> {
        // Ids are given out lowest first: behind many that never were there are none that are.
        let was_used = |all: &[Backend<A>]| all.iter().any(|backend| backend.generation != 0);
        let map = self.backends.fd().as_fd();
        let backends = batch::lookup_while::<u32, Backend<A>>(map, CHUNK, &was_used);
        let backends = backends.unwrap_or_else(|error| {
            tracing::warn!(
                "reading who serves what changed hands: {error}; clients may change backends"
            );
            Vec::new()
        });
        let live = backends
            .into_iter()
            .filter(|(_, backend)| backend.flags & BackendFlags::LIVE != 0);
        live.map(|(_, backend)| (backend.service, backend.addr, backend.port))
            .collect()
    }
}

/// What the kernel said in one round.
pub(crate) struct Asked<'a, A: Addr> {
    owners: &'a Owners<A>,
    of: Map<FrontendKey<A>, Option<ServiceId>>,
    /// Every service's live backends, once somebody wanted to know.
    serving: Option<HashSet<(ServiceId, A, Be16)>>,
}

impl<A: Addr + Hash> Asked<'_, A>
where
    FrontendKey<A>: aya::Pod,
    Backend<A>: Plain + Default,
{
    /// Whether a frontend of `service` is another one's by now, which `backend` does not serve.
    ///
    /// As kube-proxy has it (`CleanStaleEntries` in its pkg/proxy/conntrack): what goes to a frontend that
    /// nobody has any more stays where it is, and so does what the next one would send to the same place.
    pub(crate) fn is_anothers(
        &mut self,
        frontend: FrontendKey<A>,
        service: ServiceId,
        backend: (A, Be16),
    ) -> bool {
        let owners = self.owners;
        let owner = *self.of.entry(frontend).or_insert_with(|| {
            let held = owners.frontends.get(&frontend, 0);
            held.ok().map(|held| held.service)
        });
        let Some(owner) = owner.filter(|owner| *owner != service) else {
            return false;
        };
        let serving = self.serving.get_or_insert_with(|| owners.serving());
        !serving.contains(&(owner, backend.0, backend.1))
    }

    /// Whether a flow has to begin anew, since its frontend is another service's.
    pub(super) fn concern(&mut self, flow: &Flow<A>) -> bool {
        if !follows_frontend(flow) {
            return false;
        }
        let frontend = FrontendKey::new(flow.frontend, flow.frontend_port, flow.proto);
        let backend = (flow.backend, flow.backend_port);
        self.is_anothers(frontend, flow.service, backend)
    }
}

/// Whether a flow goes where its frontend goes: one without connections, and one that is still to be
/// agreed to. An established connection ends by itself.
fn follows_frontend<A>(flow: &Flow<A>) -> bool {
    // No service, no frontend that could be another's.
    let is_services = flow.backend_generation != 0;
    is_services
        && match flow.state {
            FlowState::EMBRYONIC => true,
            FlowState::ESTABLISHED => !flow.proto.has_connections(),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use penstock_common::{Proto, V4};

    use super::*;

    #[test]
    fn connections_that_are_agreed_to_stay() {
        let flow = |state, proto| Flow::<V4> {
            state,
            proto,
            backend_generation: 1,
            ..Flow::default()
        };
        for proto in [Proto::TCP, Proto::SCTP] {
            assert!(follows_frontend(&flow(FlowState::EMBRYONIC, proto)));
            assert!(!follows_frontend(&flow(FlowState::ESTABLISHED, proto)));
            assert!(!follows_frontend(&flow(FlowState::CLOSING, proto)));
        }
        assert!(follows_frontend(&flow(FlowState::EMBRYONIC, Proto::UDP)));
        let datagrams = flow(FlowState::ESTABLISHED, Proto::UDP);
        assert!(follows_frontend(&datagrams));
        let outside = Flow {
            backend_generation: 0,
            ..datagrams
        };
        assert!(!follows_frontend(&outside), "it is no service's");
        let claimed = flow(FlowState::CLAIMED, Proto::UDP);
        assert!(!follows_frontend(&claimed), "a program still writes it");
    }
}
