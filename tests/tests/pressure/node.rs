//! A node in the kernel whose packets come and go by BPF_PROG_TEST_RUN: the real program of its
//! uplink, with maps filled by hand. Backends are pods of another node, so that this one speaks for
//! its clients.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, Pod, TestRun,
    maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, Queue, lpm_trie::Key},
    programs::{SchedClassifier, TestRunOptions, TestRunResult, Xdp},
};
use penstock_agent::{
    dataplane::{batch, pins::Pins, sizes::Sizes},
    flows::{Lifetimes, Sweeper},
};
use penstock_common::{
    Addr, AddressKind, Backend, BackendFlags, BackendId, Be16, Config, Counter, FlowId, FlowKey,
    Forwarding, Frontend, FrontendFlags, FrontendKey, NetworkFlags, Plain, Proto, Route, RouteKind,
    ServiceId, SlotRange, Timeouts, Uplink as UplinkOwner, V4, V6, XdpUplink, limits,
};

use crate::addresses;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Flags of a TCP segment (RFC 9293, 3.1).
pub mod tcp {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// The kernel's verdicts (uapi/linux/pkt_cls.h).
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;
/// Those at XDP (uapi/linux/bpf.h).
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
const XDP_REDIRECT: i32 = 4;
/// Frames of test runs come in by the loopback interface.
const LOOPBACK: u32 = 1;

pub type End = (IpAddr, u16);

/// Where the first frontend is: that of the Nth backend has the Nth port from here on.
const FRONTEND_PORT: u16 = 30_000;
pub const BACKEND_PORT: u16 = 8_080;

/// One of the two families' addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// This node's address, with node ports.
    pub fn node(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(172, 18, 0, 2).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 2).into(),
        }
    }

    /// What it speaks to pods of other nodes with.
    pub fn overlay(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 244, 1, 0).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 0).into(),
        }
    }

    /// A frontend whose only backend is [`Self::backend`] of the same number.
    pub fn frontend(self, number: u16) -> End {
        (self.node(), FRONTEND_PORT + number)
    }

    pub fn backend(self, number: u16) -> End {
        let ip = match self {
            Self::V4 => Ipv4Addr::new(10, 244, 2, number as u8).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x244, 2, 0, 0, 0, 0, number).into(),
        };
        (ip, BACKEND_PORT)
    }

    /// One of millions of clients outside.
    pub fn client(self, number: u32) -> End {
        let (high, low) = ((number >> 16) as u16, number as u16);
        let ip = match self {
            Self::V4 => Ipv4Addr::from(0x1400_0000 | number).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, high, low).into(),
        };
        (ip, 40_000)
    }
}

/// A frame without payload. Its checksum is none of the programs' business.
pub fn frame(from: End, to: End, proto: u8, flags: u8) -> Vec<u8> {
    frame_with(from, to, proto, flags, &[], &[])
}

/// A TCP segment's options with a timestamp, as Linux writes them (RFC 7323, 3.2).
pub fn stamped(flags: u8, stamp: u32) -> Vec<u8> {
    let before: &[u8] = if flags & tcp::SYN != 0 {
        // The maximum segment size, "selective acknowledgment permitted".
        &[2, 4, 5, 0xb4, 4, 2, 8, 10]
    } else {
        &[1, 1, 8, 10]
    };
    [before, &stamp.to_be_bytes(), &[0; 4]].concat()
}

/// The same with a TCP segment's options, in whole words, and payload.
pub fn frame_with(
    from: End,
    to: End,
    proto: u8,
    flags: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    if proto == TCP {
        let words = (5 + options.len() / 4) as u8;
        let offset = words << 4;
        segment.extend([0, 0, 0, 1, 0, 0, 0, 1, offset, flags, 0x10, 0, 0, 0, 0, 0]);
        segment.extend(options);
    } else {
        segment.extend([0, 8, 0, 0]);
    }
    segment.extend(payload);
    wrap(from.0, to.0, proto, &segment)
}

/// What somebody says of a frame to whom it is from: it does not fit, or has nobody to go to.
pub fn error(speaker: IpAddr, about: &[u8]) -> Vec<u8> {
    let (proto, kind) = match speaker {
        IpAddr::V4(_) => (1, [3, 4]),
        IpAddr::V6(_) => (58, [2, 0]),
    };
    let mut message = Vec::from(kind);
    message.extend([0, 0, 0, 0, 5, 0x78]);
    message.extend(&about[14..]);
    wrap(speaker, ends(about).0.0, proto, &message)
}

/// Ethernet and IP around a transport segment.
fn wrap(from: IpAddr, to: IpAddr, proto: u8, segment: &[u8]) -> Vec<u8> {
    let length = segment.len() as u16;
    // The loopback device, which test runs come in by, has this Ethernet address.
    let mut frame = vec![0; 12];
    match (from, to) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + length).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, proto, 0, 0]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([proto, 64]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        _ => panic!("two families in one frame"),
    }
    frame.extend(segment);
    frame
}

/// Source and destination of a frame of [`frame`]'s.
pub fn ends(frame: &[u8]) -> (End, End) {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    if frame[12] == 0x08 {
        let ip = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).unwrap());
        ((ip(26), port(34)), (ip(30), port(36)))
    } else {
        let ip = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap());
        ((ip(22), port(54)), (ip(38), port(56)))
    }
}

/// The node.
pub struct Node {
    ebpf: Ebpf,
    pins: PathBuf,
    forwarding: Forwarding,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

impl Node {
    /// With frontends for so many backends of each family, each over TCP and UDP.
    pub fn new(name: &str, backends: u16) -> Option<Self> {
        Self::forwarding(name, backends, Forwarding::Snat)
    }

    /// The same, with a way to its backends.
    pub fn forwarding(name: &str, backends: u16, forwarding: Forwarding) -> Option<Self> {
        Self::with(name, backends, forwarding, limits::FLOWS)
    }

    /// With frontends for so many backends, and a table for so many flows of each family.
    pub fn sized(name: &str, backends: u16, flows: u32) -> Option<Self> {
        Self::with(name, backends, Forwarding::Snat, flows)
    }

    /// The same at XDP too, which sends by an interface with this index and Ethernet address where the
    /// kernel's routes lead there.
    pub fn at_xdp(
        name: &str,
        backends: u16,
        flows: u32,
        (index, mac): (u32, [u8; 6]),
    ) -> Option<Self> {
        let mut node = Self::with(name, backends, Forwarding::Snat, flows)?;
        let [IpAddr::V4(addr4), IpAddr::V6(addr6)] = [Family::V4, Family::V6].map(Family::node)
        else {
            panic!("one of each family");
        };
        let owner = UplinkOwner {
            addr4: addr4.into(),
            addr6: addr6.into(),
        };
        node.put("UPLINKS", index, owner);
        for family in [Family::V4, Family::V6] {
            node.lead(family, None);
        }
        for (index, mac) in [(LOOPBACK, [0; 6]), (index, mac)] {
            node.put("XDP_UPLINKS", index, XdpUplink { mac, pad: 0 });
        }
        let program: &mut Xdp = node
            .ebpf
            .program_mut("xdp_uplink")
            .expect("xdp_uplink")
            .try_into()
            .expect("a program for XDP");
        program.load().expect("the verifier accepts the program");
        Some(node)
    }

    fn with(name: &str, backends: u16, forwarding: Forwarding, flows: u32) -> Option<Self> {
        penstock_testbed::require_kernel()?;
        let pins = Path::new("/sys/fs/bpf").join(format!("pn{}-{name}", std::process::id()));
        std::fs::create_dir_all(&pins).expect("bpffs is writable");
        let sizes = Sizes::new(flows);
        let mut loader = EbpfLoader::new();
        sizes.tell(&mut loader);
        let mut ebpf = loader
            .default_map_pin_directory(&pins)
            .override_global("AYA_LOG_LEVEL", &0_u8, false)
            .load(penstock_agent::dataplane::OBJECT)
            .expect("the object loads");
        for name in ["from_uplink", "from_overlay"] {
            let program: &mut SchedClassifier = ebpf
                .program_mut(name)
                .expect(name)
                .try_into()
                .expect("a classifier");
            program.load().expect("the verifier accepts the program");
            // Other kernels count other numbers, none of which may be more than a million.
            let info = program.info().expect("its info");
            let checked = info.verified_instruction_count().expect("a number");
            assert!(checked < 300_000, "{name}: {checked} instructions");
        }
        let mut node = Self {
            ebpf,
            pins,
            forwarding,
        };
        node.fill(backends, flows);
        Some(node)
    }

    fn fill(&mut self, backends: u16, flows: u32) {
        self.configure(Timeouts::default());
        for id in 0..flows {
            for name in ["FREE_FLOWS4", "FREE_FLOWS6"] {
                let mut free: Queue<&mut MapData, FlowId> =
                    self.ebpf.map_mut(name).expect(name).try_into().expect(name);
                free.push(FlowId(id), 0).expect("room for every id");
            }
        }
        for family in [Family::V4, Family::V6] {
            for ip in [family.node(), family.overlay()] {
                addresses::put(&mut self.ebpf, ip, AddressKind::NODE);
            }
            let route = Route {
                kind: RouteKind::OVERLAY,
                ..Route::default()
            };
            self.lead(family, Some(route));
            for number in 0..backends {
                let (ip, port) = family.frontend(number);
                let backend = family.backend(number);
                match (ip, backend.0) {
                    (IpAddr::V4(ip), IpAddr::V4(to)) => {
                        self.serve('4', V4::from(ip), port, V4::from(to), number);
                    }
                    (IpAddr::V6(ip), IpAddr::V6(to)) => {
                        self.serve('6', V6::from(ip), port, V6::from(to), number);
                    }
                    _ => panic!("two families in one service"),
                }
            }
        }
    }

    /// Sets when flows are forgotten.
    pub fn configure(&mut self, timeouts: Timeouts) {
        let mut config = Config {
            timeouts,
            network: NetworkFlags::FORWARD | NetworkFlags::HANDOVER4 | NetworkFlags::HANDOVER6,
            overlay_ifindex: 1,
            overlay_mtu: 1_450,
            ..Config::default()
        };
        for family in [Family::V4, Family::V6] {
            match (family.node(), family.overlay()) {
                (IpAddr::V4(node), IpAddr::V4(overlay)) => {
                    (config.node4, config.overlay4) = (node.into(), overlay.into());
                }
                (IpAddr::V6(node), IpAddr::V6(overlay)) => {
                    (config.node6, config.overlay6) = (node.into(), overlay.into());
                }
                _ => {}
            }
        }
        self.array("CONFIG").set(0, config, 0).expect("CONFIG");
    }

    fn serve<A: Addr>(&mut self, family: char, ip: A, port: u16, to: A, number: u16)
    where
        FrontendKey<A>: Pod,
        Backend<A>: Pod,
    {
        let id = u32::from(number) + if family == '4' { 0 } else { 10_000 };
        let service = ServiceId(1 + id);
        let flags = BackendFlags::LIVE | BackendFlags::SELECTED;
        let backend = Backend::new(1, flags, service, to, Be16::from_host(BACKEND_PORT));
        self.array(&format!("BACKENDS{family}"))
            .set(id, backend, 0)
            .expect("a backend");
        self.array("SLOTS")
            .set(id, BackendId(id), 0)
            .expect("SLOTS");
        let slots = SlotRange { base: id, count: 1 };
        for proto in [TCP, UDP] {
            let key = FrontendKey::new(ip, Be16::from_host(port), Proto(proto));
            let frontend = Frontend {
                service,
                flags: FrontendFlags::EXTERNAL | self.forwarding.flags(),
                slots,
                external: slots,
                affinity_secs: 0,
                key_check: key.check(),
            };
            self.put(&format!("FRONTENDS{family}"), key, frontend);
        }
    }

    fn array<T: Pod>(&mut self, name: &str) -> Array<&mut MapData, T> {
        self.ebpf.map_mut(name).expect(name).try_into().expect(name)
    }

    fn put<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
        let mut map: HashMap<&mut MapData, K, V> =
            self.ebpf.map_mut(name).expect(name).try_into().expect(name);
        map.insert(key, value, 0).expect(name);
    }

    /// Leads to the backends by a route of the overlay, or by the kernel's.
    fn lead(&mut self, family: Family, route: Option<Route>) {
        match family.backend(0).0 {
            IpAddr::V4(ip) => self.route("ROUTES4", Key::new(24, V4::from(ip)), route),
            IpAddr::V6(ip) => self.route("ROUTES6", Key::new(48, V6::from(ip)), route),
        }
    }

    fn route<A: Pod>(&mut self, name: &str, key: Key<A>, route: Option<Route>) {
        let mut map: LpmTrie<&mut MapData, A, Route> =
            self.ebpf.map_mut(name).expect(name).try_into().expect(name);
        match route {
            Some(route) => map.insert(&key, route, 0),
            None => map.remove(&key),
        }
        .expect(name);
    }

    /// The agent's sweeper of this node's flows.
    pub fn sweeper(&self, lifetimes: Lifetimes) -> Sweeper {
        Sweeper::open(&Pins::within(self.pins.clone()), lifetimes).expect("the maps are pinned")
    }

    /// Loads the programs of its pods' interfaces too.
    pub fn load_pods(&mut self) {
        for name in ["from_pod", "to_pod"] {
            let program: &mut SchedClassifier = self
                .ebpf
                .program_mut(name)
                .expect(name)
                .try_into()
                .expect(name);
            program.load().expect("the verifier accepts the program");
        }
    }

    /// Its program.
    pub fn uplink(&self) -> Uplink<'_> {
        self.hook("from_uplink")
    }

    /// The program of one of its hooks.
    pub fn hook(&self, name: &str) -> Uplink<'_> {
        let program = self.ebpf.program(name).expect(name);
        Uplink {
            tc: program.try_into().expect("a classifier"),
            xdp: None,
        }
    }

    /// Its uplink where XDP comes first.
    pub fn xdp(&self) -> Uplink<'_> {
        let program = self.ebpf.program("xdp_uplink").expect("xdp_uplink");
        Uplink {
            xdp: Some(program.try_into().expect("a program for XDP")),
            ..self.uplink()
        }
    }

    /// Its program for what comes out of the overlay.
    pub fn overlay(&self) -> Uplink<'_> {
        self.hook("from_overlay")
    }

    /// Checks that every reply's key is counted, and nothing else: a reply that is not is taken for no
    /// flow's, and one too many costs a look-up for each packet of such an end.
    pub fn assert_responders_are_counted(&self) {
        let mut counted = vec![0_u64; limits::RESPONDERS as usize];
        self.count_replies::<V4>("FLOW_INDEX4", &mut counted);
        self.count_replies::<V6>("FLOW_INDEX6", &mut counted);
        let map = self.ebpf.map("RESPONDERS").expect("RESPONDERS");
        let responders: Array<&MapData, u64> = map.try_into().expect("an array");
        let held: Vec<u64> = responders
            .iter()
            .map(|count| count.expect("a count"))
            .collect();
        assert!(
            held == counted,
            "of {} replies",
            counted.iter().sum::<u64>()
        );
    }

    fn count_replies<A: Addr>(&self, name: &str, counted: &mut [u64])
    where
        FlowKey<A>: Plain + Default,
    {
        let map = self.ebpf.map(name).expect(name);
        let (Map::HashMap(data) | Map::LruHashMap(data)) = map else {
            panic!("{name} is no hash table");
        };
        let all = batch::lookup_all::<FlowKey<A>, FlowId>(data.fd().as_fd(), 8_192);
        for (key, _) in all.expect(name) {
            if key.direction == FlowKey::<A>::REPLY {
                counted[key.responder().0 as usize] += 1;
            }
        }
    }

    /// A frontend of `number` that is another one's service's, whether or not it had one of its own.
    pub fn share(&mut self, family: Family, number: u16, with: u16) {
        let (ip, port) = family.frontend(number);
        match ip {
            IpAddr::V4(ip) => self.share_with::<V4>("FRONTENDS4", ip.into(), port, with),
            IpAddr::V6(ip) => self.share_with::<V6>("FRONTENDS6", ip.into(), port, with),
        }
    }

    fn share_with<A: Addr>(&mut self, map: &str, ip: A, port: u16, with: u16)
    where
        FrontendKey<A>: Pod,
    {
        let mut map = self.frontends(map);
        for proto in [TCP, UDP] {
            let key = |port| FrontendKey::new(ip, Be16::from_host(port), Proto(proto));
            let own = key(port);
            let mut frontend = map.get(&key(FRONTEND_PORT + with), 0).expect("served");
            frontend.key_check = own.check();
            map.insert(own, frontend, 0).expect("room for a frontend");
        }
    }

    fn frontends<A: Addr>(&mut self, map: &str) -> HashMap<&mut MapData, FrontendKey<A>, Frontend>
    where
        FrontendKey<A>: Pod,
    {
        self.ebpf.map_mut(map).expect(map).try_into().expect(map)
    }

    /// Takes a frontend away, and leaves its backend.
    pub fn give_up(&mut self, family: Family, number: u16) {
        let (ip, port) = family.frontend(number);
        match ip {
            IpAddr::V4(ip) => self.give_up_of::<V4>("FRONTENDS4", ip.into(), port),
            IpAddr::V6(ip) => self.give_up_of::<V6>("FRONTENDS6", ip.into(), port),
        }
    }

    fn give_up_of<A: Addr>(&mut self, map: &str, ip: A, port: u16)
    where
        FrontendKey<A>: Pod,
    {
        let mut map = self.frontends(map);
        for proto in [TCP, UDP] {
            let key = FrontendKey::new(ip, Be16::from_host(port), Proto(proto));
            map.remove(&key).expect("it is there");
        }
    }

    /// A backend of `number`'s service where another one's is, which gets nothing new.
    pub fn serve_too(&mut self, family: Family, number: u16, with: u16) {
        let (to, _) = family.backend(with);
        self.set_second(family, to, number, BackendFlags::LIVE);
    }

    /// Takes that backend away.
    pub fn serve_no_more(&mut self, family: Family) {
        self.set_second(family, family.backend(0).0, 0, 0);
    }

    fn set_second(&mut self, family: Family, to: IpAddr, number: u16, flags: u32) {
        const ID: u32 = 20_000;
        let port = Be16::from_host(BACKEND_PORT);
        let service = |first: u32| ServiceId(1 + first + u32::from(number));
        match to {
            IpAddr::V4(to) => {
                let backend = Backend::new(1, flags, service(0), V4::from(to), port);
                self.array("BACKENDS4").set(ID, backend, 0)
            }
            IpAddr::V6(to) => {
                let backend = Backend::new(1, flags, service(10_000), V6::from(to), port);
                self.array("BACKENDS6").set(ID, backend, 0)
            }
        }
        .unwrap_or_else(|error| panic!("{family:?}: {error}"));
    }

    /// A counter's sum over all CPUs.
    pub fn count(&self, counter: Counter) -> u64 {
        let map = self.ebpf.map("COUNTERS").expect("COUNTERS");
        let counts: PerCpuArray<&MapData, u64> = map.try_into().expect("a per-CPU array");
        let counts = counts.get(&(counter as u32), 0);
        counts.expect("every counter exists").iter().sum()
    }
}

fn test<P>(program: &P, frame: &[u8], output: &mut [u8]) -> i32
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(output),
        ..TestRunOptions::new()
    };
    let result = program.test_run(options);
    result.expect("the kernel runs the program").return_value as i32
}

/// A program that meets what comes in, by the node's uplink if not said otherwise.
#[derive(Clone, Copy)]
pub struct Uplink<'a> {
    tc: &'a SchedClassifier,
    /// What comes before it.
    xdp: Option<&'a Xdp>,
}

impl Uplink<'_> {
    /// Whether packets meet XDP first.
    pub fn is_past_xdp(&self) -> bool {
        self.xdp.is_some()
    }

    /// The program's verdict, and what became of the frame in `output`; TC's where XDP leaves it alone.
    pub fn run(&self, frame: &[u8], output: &mut [u8]) -> i32 {
        if let Some(xdp) = self.xdp {
            match test(xdp, frame, output) {
                XDP_REDIRECT => return REDIRECT,
                XDP_DROP => return SHOT,
                XDP_PASS => {}
                verdict => panic!("verdict {verdict} of XDP for {:?}", ends(frame)),
            }
        }
        test(self.tc, frame, output)
    }

    /// Whom a packet goes to and whom it seems to come from; `None` if it was dropped.
    pub fn pass(&self, from: End, to: End, proto: u8, flags: u8) -> Option<(End, End)> {
        self.send(&frame(from, to, proto, flags))
    }

    /// The same of a frame.
    pub fn send(&self, frame: &[u8]) -> Option<(End, End)> {
        let mut output = vec![0; frame.len()];
        match self.run(frame, &mut output) {
            SHOT => None,
            // To the other node, or, as this program leaves it, to whoever is outside.
            REDIRECT | -1 => Some(ends(&output)),
            verdict => panic!("verdict {verdict} for {:?}", ends(frame)),
        }
    }
}
