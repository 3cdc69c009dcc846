//! The programs and maps in the kernel.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use aya::{
    Ebpf, EbpfLoader, Pod, TestRun,
    maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, Queue, lpm_trie::Key},
    programs::{SchedClassifier, TestRunOptions, TestRunResult, Xdp},
};
use penstock_common::{
    Addr, AddressKind, Algorithm, Backend, BackendCounts, BackendFlags, BackendId, BackendLife,
    Be16, Config, Connections, Counter, Endpoint as PodEndpoint, Flow, FlowCounts, FlowId,
    FlowState, FragmentKey, FragmentPorts, Frontend, FrontendFlags, FrontendKey, Load, Proto,
    Route, ServiceId, SlotRange, SourceRange, Timeouts, V4, V6, limits,
};

use crate::{
    addresses,
    model::{Endpoint, Hook, Model, Service, Tally, load_before, service_id, weight},
};

/// How short the kernel lets a frame be in a test run: with its whole IP header (seen from
/// Linux 6.18 on).
pub fn shortest(frame: &[u8]) -> usize {
    match crate::frame::family(frame) {
        Some(true) => 34,
        Some(false) => 54,
        None => 14,
    }
}

/// In seconds.
const HOUR: u32 = 3_600;
/// For how long a client with affinity may be away.
pub const AFFINITY_SECS: u32 = 86_400;

pub struct Kernel {
    ebpf: Ebpf,
    pins: PathBuf,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

impl Kernel {
    /// Loads the programs of pods' hooks and fills the maps with the model's services.
    pub fn load(model: &Model) -> Option<Self> {
        let mut kernel = Self::without_programs("packets", model)?;
        for name in ["from_pod", "to_pod"] {
            kernel.load_classifier(name);
        }
        Some(kernel)
    }

    /// The maps, filled with the model's services, pinned in a folder with `name` in its own.
    pub fn without_programs(name: &str, model: &Model) -> Option<Self> {
        penstock_testbed::require_kernel()?;
        static LOADED: AtomicU32 = AtomicU32::new(0);
        let number = LOADED.fetch_add(1, Ordering::Relaxed);
        let name = format!("pn{}-{name}{number}", std::process::id());
        let pins = Path::new("/sys/fs/bpf").join(name);
        std::fs::create_dir_all(&pins).expect("bpffs is writable");
        let ebpf = EbpfLoader::new()
            .default_map_pin_directory(&pins)
            .override_global("AYA_LOG_LEVEL", &0_u8, false)
            .load(penstock_agent::dataplane::OBJECT)
            .expect("the object loads");
        let mut kernel = Self { ebpf, pins };
        kernel.fill(model);
        Some(kernel)
    }

    fn classifier(&mut self, name: &str) -> &mut SchedClassifier {
        self.ebpf
            .program_mut(name)
            .expect(name)
            .try_into()
            .expect("a classifier")
    }

    /// Loads a program of a TC hook.
    pub fn load_classifier(&mut self, name: &str) {
        let program = self.classifier(name);
        program.load().expect("the verifier accepts the program");
    }

    fn xdp(&mut self) -> &mut Xdp {
        self.ebpf
            .program_mut("xdp_uplink")
            .expect("the program")
            .try_into()
            .expect("a program for XDP")
    }

    /// Loads XDP's program.
    pub fn load_xdp(&mut self) {
        let program = self.xdp();
        program.load().expect("the verifier accepts the program");
    }

    fn fill(&mut self, model: &Model) {
        let (mut slot, mut next) = (0, 0);
        for (number, service) in model.services.iter().enumerate() {
            let id = service_id(number);
            let base = slot;
            let is_by_load = service.algorithm == Algorithm::LeastConnections;
            for (place, backend) in service.backends.iter().enumerate() {
                self.array("SLOTS")
                    .set(slot, BackendId(next), 0)
                    .expect("SLOTS");
                let weight = if is_by_load { weight(place) } else { 1 };
                self.put_backend(next, id, *backend, weight);
                if is_by_load {
                    let load = Load {
                        generation: 1,
                        live: load_before(place) as u32,
                        given: 0,
                    };
                    self.put_load(next, backend.0, load);
                }
                slot += 1;
                next += 1;
            }
            self.put_frontend(
                id,
                service,
                SlotRange {
                    base,
                    count: slot - base,
                },
            );
        }
        for address in &model.service_addrs {
            self.put_address(*address, AddressKind::SERVICE);
        }
        // The model has no clock: nothing is over because a slow machine takes long.
        let timeouts = Timeouts {
            tcp_syn_secs: HOUR,
            tcp_established_secs: HOUR,
            tcp_closing_secs: HOUR,
            udp_secs: HOUR,
            udp_stream_secs: HOUR,
        };
        let mut config = Config {
            timeouts,
            ..Config::default()
        };
        for address in &model.nodes {
            self.put_address(*address, AddressKind::NODE);
            match address {
                IpAddr::V4(ip) => config.node4 = (*ip).into(),
                IpAddr::V6(ip) => config.node6 = (*ip).into(),
            }
        }
        self.array("CONFIG").set(0, config, 0).expect("CONFIG");
        for name in ["FREE_FLOWS4", "FREE_FLOWS6"] {
            let mut free: Queue<&mut MapData, FlowId> = self
                .ebpf
                .map_mut(name)
                .expect(name)
                .try_into()
                .expect("a queue");
            for id in 0..limits::FLOWS {
                free.push(FlowId(id), 0).expect("room for every id");
            }
        }
    }

    pub fn array<T: Pod>(&mut self, name: &str) -> Array<&mut MapData, T> {
        self.ebpf
            .map_mut(name)
            .expect(name)
            .try_into()
            .expect("an array")
    }

    pub fn put<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
        let mut map: HashMap<&mut MapData, K, V> = self
            .ebpf
            .map_mut(name)
            .expect(name)
            .try_into()
            .expect("a hash map");
        map.insert(key, value, 0).expect(name);
    }

    pub fn get<K: Pod, V: Pod>(&mut self, name: &str, key: &K) -> Option<V> {
        let map: HashMap<&mut MapData, K, V> = self
            .ebpf
            .map_mut(name)
            .expect(name)
            .try_into()
            .expect("a hash map");
        map.get(key, 0).ok()
    }

    /// Makes no datagram's parts known.
    pub fn forget_parts(&mut self) {
        fn clear<A>(map: &mut Map)
        where
            FragmentKey<A>: Pod,
        {
            let mut map: HashMap<&mut MapData, FragmentKey<A>, FragmentPorts> =
                map.try_into().expect("a hash map");
            let keys: Vec<FragmentKey<A>> = map.keys().map(|key| key.expect("a key")).collect();
            for key in keys {
                map.remove(&key).expect("it was there");
            }
        }
        clear::<V4>(self.map("FRAGMENTS4"));
        clear::<V6>(self.map("FRAGMENTS6"));
    }

    /// Puts a range behind a route, or takes it away.
    pub fn route(&mut self, (ip, bits): (IpAddr, u32), route: Option<Route>) {
        fn set<A: Pod>(map: &mut Map, key: Key<A>, route: Option<Route>) {
            let mut map: LpmTrie<&mut MapData, A, Route> = map.try_into().expect("a trie");
            match route {
                Some(route) => map.insert(&key, route, 0),
                None => map.remove(&key),
            }
            .expect("the route is written");
        }
        let name = if ip.is_ipv4() { "ROUTES4" } else { "ROUTES6" };
        let map = self.ebpf.map_mut(name).expect(name);
        match ip {
            IpAddr::V4(ip) => set(map, Key::new(bits, V4::from(ip)), route),
            IpAddr::V6(ip) => set(map, Key::new(bits, V6::from(ip)), route),
        }
    }

    pub fn put_endpoint(&mut self, ip: IpAddr, endpoint: PodEndpoint) {
        match ip {
            IpAddr::V4(ip) => self.put("ENDPOINTS4", V4::from(ip), endpoint),
            IpAddr::V6(ip) => self.put("ENDPOINTS6", V6::from(ip), endpoint),
        }
    }

    pub fn put_address(&mut self, address: IpAddr, kind: u32) {
        addresses::put(&mut self.ebpf, address, kind);
    }

    fn put_load(&mut self, id: u32, address: IpAddr, load: Load) {
        let map = if address.is_ipv4() {
            "LOADS4"
        } else {
            "LOADS6"
        };
        self.put(map, BackendId(id), load);
    }

    fn put_backend(
        &mut self,
        id: u32,
        service: ServiceId,
        (address, port): (IpAddr, u16),
        weight: u16,
    ) {
        let flags = BackendFlags::LIVE | BackendFlags::SELECTED;
        let port = Be16::from_host(port);
        match address {
            IpAddr::V4(ip) => {
                let backend = Backend::new(1, flags, service, V4::from(ip), port).weighing(weight);
                self.array("BACKENDS4")
                    .set(id, backend, 0)
                    .expect("BACKENDS4");
            }
            IpAddr::V6(ip) => {
                let backend = Backend::new(1, flags, service, V6::from(ip), port).weighing(weight);
                self.array("BACKENDS6")
                    .set(id, backend, 0)
                    .expect("BACKENDS6");
            }
        }
    }

    fn put_frontend(&mut self, id: ServiceId, service: &Service, slots: SlotRange) {
        fn entry<A: Addr>(
            address: A,
            id: ServiceId,
            service: &Service,
            slots: SlotRange,
        ) -> (FrontendKey<A>, Frontend) {
            let port = Be16::from_host(service.frontend.1);
            let key = FrontendKey::new(address, port, Proto(service.proto));
            let flags = if service.drops_when_empty {
                FrontendFlags::DROP_WHEN_EMPTY | FrontendFlags::LOCAL
            } else {
                0
            };
            let affinity_secs = if service.has_affinity {
                AFFINITY_SECS
            } else {
                0
            };
            let key_check = key.check();
            (
                key,
                Frontend {
                    service: id,
                    flags: flags | service.algorithm.flags(),
                    slots,
                    external: slots,
                    affinity_secs,
                    key_check,
                },
            )
        }
        match service.frontend.0 {
            IpAddr::V4(ip) => {
                let (key, value) = entry(V4::from(ip), id, service, slots);
                self.put("FRONTENDS4", key, value);
            }
            IpAddr::V6(ip) => {
                let (key, value) = entry(V6::from(ip), id, service, slots);
                self.put("FRONTENDS6", key, value);
            }
        }
    }

    /// Gives a frontend these flags beside its own; its service.
    pub fn flag_frontend(&mut self, (ip, port): Endpoint, proto: u8, flags: u32) -> ServiceId {
        fn flag<A: Addr>(
            kernel: &mut Kernel,
            name: &str,
            key: FrontendKey<A>,
            flags: u32,
        ) -> ServiceId
        where
            FrontendKey<A>: Pod,
        {
            let frontend: Frontend = kernel.get(name, &key).expect("the frontend");
            let flags = frontend.flags | flags;
            kernel.put(name, key, Frontend { flags, ..frontend });
            frontend.service
        }
        let (port, proto) = (Be16::from_host(port), Proto(proto));
        match ip {
            IpAddr::V4(ip) => flag(
                self,
                "FRONTENDS4",
                FrontendKey::new(V4::from(ip), port, proto),
                flags,
            ),
            IpAddr::V6(ip) => flag(
                self,
                "FRONTENDS6",
                FrontendKey::new(V6::from(ip), port, proto),
                flags,
            ),
        }
    }

    /// Lets a client of a service in that has ranges of clients.
    pub fn let_in(&mut self, service: ServiceId, client: IpAddr) {
        fn set<A: Addr>(map: &mut Map, service: ServiceId, addr: A)
        where
            SourceRange<A>: Pod,
        {
            let bits = SourceRange::<A>::SERVICE_BITS + 8 * size_of::<A>() as u32;
            let mut map: LpmTrie<&mut MapData, SourceRange<A>, u32> =
                map.try_into().expect("a trie");
            map.insert(&Key::new(bits, SourceRange { service, addr }), 1, 0)
                .expect("the range is written");
        }
        match client {
            IpAddr::V4(ip) => set(self.map("SOURCE_RANGES4"), service, V4::from(ip)),
            IpAddr::V6(ip) => set(self.map("SOURCE_RANGES6"), service, V6::from(ip)),
        }
    }

    fn map(&mut self, name: &str) -> &mut Map {
        self.ebpf.map_mut(name).expect(name)
    }

    /// What the program at a hook makes of a frame.
    pub fn run(&mut self, hook: Hook, input: &[u8]) -> (i32, Vec<u8>) {
        let name = if hook == Hook::FromPod {
            "from_pod"
        } else {
            "to_pod"
        };
        run(self.classifier(name), input)
    }

    /// What a program of a TC hook makes of a frame.
    pub fn run_classifier(&mut self, name: &str, input: &[u8]) -> (i32, Vec<u8>) {
        run(self.classifier(name), input)
    }

    /// What XDP's program makes of a frame.
    pub fn run_xdp(&mut self, input: &[u8]) -> (i32, Vec<u8>) {
        run(self.xdp(), input)
    }

    /// The state and the FINs of the only IPv4 flow.
    pub fn only_flow(&mut self) -> (u32, u8) {
        let flows = self.array::<Flow<V4>>("FLOWS4");
        let all = (0..limits::FLOWS).map(|id| flows.get(&id, 0).expect("FLOWS4"));
        let live: Vec<Flow<V4>> = all.filter(|flow| flow.state != FlowState::FREE).collect();
        assert_eq!(live.len(), 1, "{live:?}");
        (live[0].state, live[0].fins)
    }

    /// What was counted of a family's backends: of flows that have ended, and of those that are there.
    fn tallies<A: Addr>(
        &mut self,
        [backends, connections, ended, flows, counts]: [&'static str; 5],
        ip: impl Fn(A) -> IpAddr,
    ) -> BTreeMap<(ServiceId, Endpoint), Tally>
    where
        Backend<A>: Pod,
        Flow<A>: Pod,
    {
        let ended: HashMap<&MapData, BackendLife, BackendCounts> = self
            .ebpf
            .map(ended)
            .expect(ended)
            .try_into()
            .expect("a hash map");
        let ended: Vec<(BackendLife, BackendCounts)> =
            ended.iter().collect::<Result<_, _>>().expect(backends);
        let mut tallies: BTreeMap<_, Tally> = BTreeMap::new();
        for id in 0..1_000 {
            let backend: Backend<A> = self.array(backends).get(&id, 0).expect(backends);
            let given: Connections = self.array(connections).get(&id, 0).expect(connections);
            if given.count > 0 {
                assert_eq!(given.generation, backend.generation);
                assert_eq!(given.service, backend.service);
                let endpoint = (ip(backend.addr), backend.port.to_host());
                let tally = tallies.entry((backend.service, endpoint)).or_default();
                tally.connections = given.count;
            }
        }
        for (life, counts) in ended {
            let backend: Backend<A> = self
                .array(backends)
                .get(&life.backend.0, 0)
                .expect(backends);
            assert_eq!(life.generation, backend.generation);
            assert_eq!(life.author, BackendLife::PROGRAMS);
            assert_eq!(counts.service, backend.service);
            let endpoint = (ip(backend.addr), backend.port.to_host());
            assert_eq!(counts.connections, 0, "its first life is not over");
            let tally = tallies.get_mut(&(backend.service, endpoint));
            let tally = tally.expect("a connection was counted");
            tally.request = counts.request;
            tally.reply = counts.reply;
        }
        for id in 0..limits::FLOWS {
            let counts: FlowCounts = self.array(counts).get(&id, 0).expect(counts);
            if counts == FlowCounts::default() {
                continue;
            }
            let flow: Flow<A> = self.array(flows).get(&id, 0).expect(flows);
            assert_ne!(flow.state, FlowState::FREE, "an ended flow leaves zeros");
            let key = (
                flow.service,
                (ip(flow.backend), flow.backend_port.to_host()),
            );
            let tally = tallies.get_mut(&key).expect("a connection was counted");
            tally.request = tally.request.plus(counts.request);
            tally.reply = tally.reply.plus(counts.reply);
        }
        tallies
    }

    /// What was counted of all backends.
    pub fn all_tallies(&mut self) -> BTreeMap<(ServiceId, Endpoint), Tally> {
        let v4 = [
            "BACKENDS4",
            "CONNECTIONS4",
            "BACKEND_COUNTS4",
            "FLOWS4",
            "FLOW_COUNTS4",
        ];
        let v6 = [
            "BACKENDS6",
            "CONNECTIONS6",
            "BACKEND_COUNTS6",
            "FLOWS6",
            "FLOW_COUNTS6",
        ];
        let mut all = self.tallies::<V4>(v4, |ip| IpAddr::V4(ip.into()));
        all.extend(self.tallies::<V6>(v6, |ip| IpAddr::V6(ip.into())));
        all
    }

    /// A counter's sum over all CPUs.
    pub fn count(&mut self, counter: Counter) -> u64 {
        let counts: PerCpuArray<&mut MapData, u64> = self
            .ebpf
            .map_mut("COUNTERS")
            .expect("COUNTERS")
            .try_into()
            .expect("per-CPU array");
        counts
            .get(&(counter as u32), 0)
            .expect("every counter exists")
            .iter()
            .sum()
    }
}

fn run<P>(program: &P, input: &[u8]) -> (i32, Vec<u8>)
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut output = vec![0; 4_096];
    let options = TestRunOptions {
        data_in: Some(input),
        data_out: Some(&mut output),
        ..TestRunOptions::new()
    };
    let result = program
        .test_run(options)
        .expect("the kernel runs the program");
    output.truncate(result.data_size_out as usize);
    (result.return_value as i32, output)
}
