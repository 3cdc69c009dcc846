//! XDP beside the TC hook of interfaces to the outside: over the same maps, both get each of many random
//! frames. What XDP sends on has to be what TC sends on; what it leaves alone is left as it was.

use std::{
    fs::File,
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use penstock_common::{
    AddressKind, Algorithm, Config, Counter, Endpoint as PodEndpoint, FrontendFlags, NetworkFlags,
    Uplink, XdpUplink,
};
use penstock_testbed::{Node, Random, Testbed};
use serde_json::Value;

use crate::{
    frame::{self, CHUNKS, SCTP, Spec, TCP, UDP},
    ip,
    kernel::Kernel,
    model::{Endpoint, Model, NEXT, REDIRECT, SHOT, Service},
    plain, setting,
};

/// From the kernel's uapi/linux/bpf.h.
pub const XDP_PASS: i32 = 2;
pub const XDP_REDIRECT: i32 = 4;

/// Frames of test runs come in by the loopback interface, which has this Ethernet address.
pub const LOOPBACK: (u32, [u8; 6]) = (1, [0; 6]);

/// The node's own addresses, which the testbed gives its first node.
pub const NODES: [&str; 2] = ["172.31.0.11", "fd00:31::b"];
pub const BALANCERS: [&str; 2] = ["203.0.113.1", "2001:db8:203::1"];
/// A pod of this node's.
pub const PODS: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
/// Behind a gateway.
pub const CLIENTS: [[&str; 3]; 2] = [
    ["192.0.2.1", "192.0.2.2", "198.18.7.7"],
    ["2001:db8:c::1", "2001:db8:c::2", "2001:db8:d::7"],
];
/// Neighbours.
const BACKENDS: [[&str; 2]; 2] = [
    ["172.31.0.101", "172.31.0.102"],
    ["fd00:31::65", "fd00:31::66"],
];
/// A neighbour that the kernel has not found yet.
const UNKNOWN: [&str; 2] = ["172.31.0.99", "fd00:31::63"];
pub const PROTOS: [u8; 3] = [TCP, UDP, SCTP];
/// What a flow of each begins with: a SYN, anything, an INIT.
pub const OPENINGS: [u8; 3] = [2, 0, 1];
const GATEWAYS: [&str; 2] = ["172.31.0.1", "fd00:31::1"];
pub const GATEWAY_MAC: &str = "02:00:00:00:00:fe";
pub const BACKEND_MAC: &str = "02:00:00:00:00:65";

pub fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("two digits"))
        .collect();
    bytes.try_into().expect("six bytes")
}

pub fn model() -> Model {
    let mut model = Model::default();
    model.nodes = NODES.map(ip).into();
    for half in [0, 1] {
        let remote = |index: usize, port| (ip(BACKENDS[half][index]), port);
        let mut add = |frontend: Endpoint, proto, backends: Vec<Endpoint>| {
            let number = model.services.len();
            model.services.push(Service {
                frontend,
                proto,
                backends,
                drops_when_empty: false,
                has_affinity: number % 3 == 2,
                algorithm: [Algorithm::Random, Algorithm::RoundRobin][number % 2],
            });
        };
        for proto in PROTOS {
            let (node, balancer) = (ip(NODES[half]), ip(BALANCERS[half]));
            add(
                (node, 30_080),
                proto,
                vec![remote(0, 8080), remote(1, 8080)],
            );
            add((balancer, 80), proto, vec![remote(1, 8081)]);
            add((balancer, 81), proto, vec![]);
            // Among others: a pod here, this node itself, and who can't be reached yet.
            let mixed = vec![
                remote(0, 9090),
                (ip(PODS[half]), 9090),
                (node, 9090),
                (ip(UNKNOWN[half]), 9090),
            ];
            add((balancer, 82), proto, mixed);
        }
    }
    model
}

/// What stands in the way of XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Oddity {
    None,
    /// Whatever it may be.
    Garbled,
    Options,
    Fragment,
    Vlan,
    Truncated,
    LastHop,
    OtherHost,
    PartialChecksum,
    /// More than its way carries.
    TooLong,
}

struct Case {
    frame: Vec<u8>,
    oddity: Oddity,
}

/// Flows as they were seen from frames that left: protocol, source, backend.
type Seen = Vec<(u8, Endpoint, Endpoint)>;

fn generate(random: &mut Random, model: &Model, seen: &Seen) -> Case {
    let half = random.below(2);
    let client = |random: &mut Random| {
        let port = if random.chance(80) {
            40_000 + random.below(50) as u16
        } else {
            random.word() as u16
        };
        (ip(random.pick(&CLIENTS[half])), port)
    };
    let (proto, src, dst) = match random.below(100) {
        0..60 => {
            let service = random.pick(&model.services);
            let is_v4 = service.frontend.0.is_ipv4();
            let from = if is_v4 == (half == 0) {
                client(random)
            } else {
                (ip(CLIENTS[usize::from(!is_v4)][0]), random.word() as u16)
            };
            (service.proto, from, service.frontend)
        }
        60..92 if !seen.is_empty() => {
            let (proto, source, backend) = seen[random.below(seen.len())];
            (proto, backend, source)
        }
        92..96 => (
            random.pick(&PROTOS),
            client(random),
            (ip(NODES[half]), random.word() as u16),
        ),
        _ => (random.pick(&PROTOS), client(random), (ip(PODS[half]), 80)),
    };
    let mut spec = Spec {
        src,
        dst,
        proto,
        tcp_flags: if proto == SCTP {
            random.pick(&CHUNKS)
        } else {
            random.pick(&[2, 2, 2, 0x10, 0x18, 0x12, 0x11, 4])
        },
        payload: (0..random.below(100))
            .map(|_| random.word() as u8)
            .collect(),
        options: 0,
        fragment: None,
        without_checksum: src.0.is_ipv4() && proto == UDP && random.chance(10),
    };
    let oddity = if random.chance(70) {
        Oddity::None
    } else {
        random.pick(&[
            Oddity::Garbled,
            Oddity::Options,
            Oddity::Fragment,
            Oddity::Vlan,
            Oddity::Truncated,
            Oddity::LastHop,
            Oddity::OtherHost,
            Oddity::PartialChecksum,
            Oddity::TooLong,
        ])
    };
    match oddity {
        Oddity::Options => spec.options = 1 + random.below(2),
        Oddity::Fragment => {
            let offset = random.below(2) as u16 * 100;
            let more = offset == 0 || random.chance(50);
            spec.fragment = Some((random.below(40) as u32, offset, more));
        }
        Oddity::PartialChecksum => spec.without_checksum = proto == SCTP,
        Oddity::TooLong => spec.payload.resize(1_490 + random.below(100), 7),
        _ => {}
    }
    let mut frame = frame::build(&spec);
    frame[0..6].copy_from_slice(&LOOPBACK.1);
    let is_v4 = src.0.is_ipv4();
    match oddity {
        Oddity::Garbled => {
            let at = 12 + random.below(frame.len() - 12);
            frame[at] = random.word() as u8;
        }
        Oddity::Vlan => {
            frame.splice(12..12, [0x81, 0x00, 0x00, 0x2a]);
        }
        Oddity::Truncated => {
            // Within the headers, as far as the kernel lets test runs be short.
            let least = crate::kernel::shortest(&frame);
            frame.truncate(least + random.below(8));
        }
        Oddity::LastHop if is_v4 => {
            frame[22] = random.below(2) as u8;
            frame[24..26].fill(0);
            let checksum = !frame::fold(frame::sum(&frame[14..34]));
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        Oddity::LastHop => frame[21] = random.below(2) as u8,
        Oddity::OtherHost => frame[0..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]),
        Oddity::PartialChecksum if proto != SCTP => {
            let header = frame::header(&frame, 14, is_v4).expect("a whole header");
            let at = header.transport + if proto == TCP { 16 } else { 6 };
            let sum = frame::pseudo_checksum(&header);
            frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        _ => {}
    }
    Case { frame, oddity }
}

/// Tells the programs what they need to know of the node beside services; its Ethernet address.
pub fn describe(kernel: &mut Kernel, node: &Node) -> [u8; 6] {
    let links = node.host.run("ip", &["-j", "link", "show", "eth0"]);
    let links: Value = serde_json::from_str(&links.expect("ip")).expect("JSON");
    let index = links[0]["ifindex"].as_u64().expect("a number") as u32;
    let own = mac(links[0]["address"].as_str().expect("a text"));
    let addresses = NODES.map(|text| text.parse::<IpAddr>().expect("an address"));
    let [IpAddr::V4(addr4), IpAddr::V6(addr6)] = addresses else {
        panic!("one of each family");
    };
    let uplink = Uplink {
        addr4: addr4.into(),
        addr6: addr6.into(),
    };
    kernel.put("UPLINKS", index, uplink);
    for (index, mac) in [LOOPBACK, (index, own)] {
        kernel.put("XDP_UPLINKS", index, XdpUplink { mac, pad: 0 });
    }
    for address in BALANCERS {
        kernel.put_address(ip(address), AddressKind::EXTERNAL);
    }
    let pod = PodEndpoint {
        ifindex: index,
        ..PodEndpoint::default()
    };
    for text in PODS {
        kernel.put_endpoint(ip(text), pod);
    }
    let config = Config {
        node4: addr4.into(),
        node6: addr6.into(),
        network: NetworkFlags::FORWARD,
        ..Config::default()
    };
    kernel
        .array("CONFIG")
        .set(0, config, 0)
        .expect("CONFIG is writable");
    own
}

/// The node's ways: neighbours, and a gateway for everybody else.
pub fn lay_out(node: &Node) {
    let run = |arguments: &[&str]| node.host.run("ip", arguments).expect("ip");
    for half in [0, 1] {
        let neighbours = BACKENDS[half].map(|ip| (ip, BACKEND_MAC));
        for (ip, mac) in neighbours
            .into_iter()
            .chain([(GATEWAYS[half], GATEWAY_MAC)])
        {
            run(&[
                "neigh",
                "replace",
                ip,
                "lladdr",
                mac,
                "dev",
                "eth0",
                "nud",
                "permanent",
            ]);
        }
        run(&["route", "replace", "default", "via", GATEWAYS[half]]);
    }
}

/// Whom a frame that left is from and to, if it has ports.
pub fn ends(frame: &[u8]) -> Option<(u8, Endpoint, Endpoint)> {
    let header = frame::header(frame, 14, frame::family(frame)?)?;
    let (src, dst) = frame::ports(frame, header.transport)?;
    Some((header.proto, (header.src, src), (header.dst, dst)))
}

/// Whether a segment begins a connection and ends it: whoever sees it second meets a flow that it has
/// already ended.
fn begins_and_ends(frame: &[u8]) -> bool {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    let header = frame::family(frame).and_then(|family| frame::header(frame, 14, family));
    let header = header.filter(|header| header.proto == TCP);
    let flags = header.and_then(|header| frame.get(header.transport + 13));
    flags.is_some_and(|flags| flags & SYN != 0 && flags & (FIN | RST) != 0)
}

/// Whether a frame is the first part of an SCTP packet, which may need a checksum that nobody knows.
fn is_split(frame: &[u8]) -> bool {
    let header = frame::family(frame).and_then(|family| frame::header(frame, 14, family));
    header.is_some_and(|header| header.proto == SCTP && header.is_part)
}

/// How often XDP sent what.
#[derive(Default, Debug)]
struct Sent {
    requests: [[u64; 3]; 2],
    replies: [[u64; 3]; 2],
    /// Flows that were not there before XDP saw their first packet.
    first: u64,
    all: u64,
}

fn compare(node: &Node) {
    let model = model();
    let Some(mut kernel) = Kernel::without_programs("xdp", &model) else {
        return;
    };
    lay_out(node);
    let own = describe(&mut kernel, node);
    kernel.load_classifier("from_uplink");
    kernel.load_xdp();
    let packets = setting("PENSTOCK_PACKETS", 30_000);
    let mut random = Random(setting("PENSTOCK_SEED", 0x0123_4567_89ab_cdef));
    let (mut seen, mut sent) = (Seen::new(), Sent::default());
    let mut split = 0;
    for number in 0..packets {
        let Case { frame, oddity } = generate(&mut random, &model, &seen);
        if begins_and_ends(&frame) {
            continue;
        }
        split += u64::from(is_split(&frame));
        let is_xdp_first = random.chance(50);
        let flows = kernel.count(Counter::FlowCreated);
        let mut xdp = is_xdp_first.then(|| kernel.run_xdp(&frame));
        let is_first = kernel.count(Counter::FlowCreated) > flows;
        let (tc_verdict, tc) = kernel.run_classifier("from_uplink", &frame);
        let (xdp_verdict, xdp) = xdp.take().unwrap_or_else(|| kernel.run_xdp(&frame));
        let fail = |problem: &str| -> ! {
            panic!(
                "packet {number}, {oddity:?}, XDP first: {is_xdp_first}: {problem}\nXDP {xdp_verdict}, \
                 TC {tc_verdict}\ninput {frame:02x?}\nXDP   {xdp:02x?}\nTC    {tc:02x?}"
            )
        };
        if !matches!(tc_verdict, NEXT | SHOT | REDIRECT) {
            fail("TC's verdict is none of its own");
        }
        if tc_verdict == REDIRECT
            && tc[12..] != frame[12..]
            && let Some((proto, source, backend)) = ends(&tc)
            && NODES.map(ip).contains(&source.0)
            && seen.len() < 4_000
        {
            seen.push((proto, source, backend));
        }
        if xdp_verdict == XDP_PASS {
            if xdp != frame {
                fail("XDP changed what it left alone");
            }
            continue;
        }
        if xdp_verdict != XDP_REDIRECT {
            fail("XDP's verdict");
        }
        if !matches!(oddity, Oddity::None | Oddity::Garbled) {
            fail("this is TC's to do");
        }
        if tc_verdict != REDIRECT || xdp[12..] != tc[12..] {
            fail("TC did something else");
        }
        if frame::wrongs(&xdp) != frame::wrongs(&frame) {
            fail("checksums are not as right or wrong as they were");
        }
        let (proto, src, dst) = ends(&xdp).expect("a transport");
        let is_backend = BACKENDS.as_flattened().iter().any(|text| ip(text) == dst.0);
        let neighbour = mac(if is_backend { BACKEND_MAC } else { GATEWAY_MAC });
        if xdp[0..6] != neighbour || xdp[6..12] != own {
            fail("Ethernet addresses");
        }
        let counts = if is_backend {
            &mut sent.requests
        } else {
            &mut sent.replies
        };
        let place = PROTOS.iter().position(|other| *other == proto);
        counts[usize::from(src.0.is_ipv4())][place.expect("a transport")] += 1;
        sent.first += u64::from(is_first);
        sent.all += 1;
    }
    eprintln!("{packets} packets: {sent:?}");
    let many = packets / 100;
    for count in [sent.requests, sent.replies].as_flattened().as_flattened() {
        assert!(*count > many, "{sent:?}");
    }
    assert!(sent.first > many, "{sent:?}");
    assert_eq!(kernel.count(Counter::ExternalXdp), sent.all);
    // What XDP counts as a request or a reply, TC counts once more, having got the same.
    let translated = kernel.count(Counter::ExternalRequest) + kernel.count(Counter::ExternalReply);
    assert!(translated >= 2 * sent.all, "{translated} {sent:?}");
    let failed = kernel.count(Counter::RewriteFailed);
    assert!(failed <= split, "{failed} of {split}");
}

/// Does something in a node's namespace: the kernel asks the routes of whoever runs a program.
pub fn inside(node: &Node, act: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            let namespace = File::open(format!("/run/netns/{}", node.host.name));
            setns(namespace.expect("its namespace"), CloneFlags::CLONE_NEWNET).expect("setns");
            act();
        });
        if let Err(panic) = acting.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A known flow.
struct Remembered {
    kernel: Kernel,
    request: [Vec<u8>; 2],
    reply: [Vec<u8>; 2],
    /// What was written to `CHANGED`.
    changed: u64,
}

impl Remembered {
    fn new(half: usize, node: &Node) -> Option<Self> {
        let model = model();
        let mut kernel = Kernel::without_programs("hop", &model)?;
        lay_out(node);
        describe(&mut kernel, node);
        kernel.load_classifier("from_uplink");
        kernel.load_xdp();
        let (client, balancer) = (ip(CLIENTS[half][0]), ip(BALANCERS[half]));
        let (src, dst) = ((client, 40_000), (balancer, 80));
        let (verdict, translated) = kernel.run_classifier("from_uplink", &tcp(src, dst, 2, 0));
        assert_eq!(verdict, REDIRECT);
        let (_, source, backend) = ends(&translated).expect("a transport");
        let lengths = [100, 1_350];
        Some(Self {
            kernel,
            request: lengths.map(|length| tcp(src, dst, 0x10, length)),
            reply: lengths.map(|length| tcp(backend, source, 0x10, length)),
            changed: 1,
        })
    }

    /// The Ethernet addresses that short requests and replies are sent to, or long ones; none where they
    /// are left alone.
    fn sent(&mut self, is_long: bool) -> [Option<[u8; 6]>; 2] {
        let index = usize::from(is_long);
        [&self.request[index], &self.reply[index]].map(|frame| {
            // Of a flow that nobody saw for some seconds the first packet is TC's.
            self.kernel.run_classifier("from_uplink", frame);
            let (verdict, sent) = self.kernel.run_xdp(frame);
            (verdict == XDP_REDIRECT).then(|| sent[0..6].try_into().expect("six bytes"))
        })
    }

    /// As the agent does when it hears that something changed.
    fn change(&mut self) {
        self.changed += 1;
        let changed = self.changed;
        let mut map = self.kernel.array("CHANGED");
        map.set(0, changed, 0).expect("CHANGED is writable");
    }
}

fn tcp(src: Endpoint, dst: Endpoint, tcp_flags: u8, length: usize) -> Vec<u8> {
    let mut frame = frame::build(&Spec {
        src,
        dst,
        proto: TCP,
        tcp_flags,
        payload: vec![7; length],
        options: 0,
        fragment: None,
        without_checksum: false,
    });
    frame[0..6].copy_from_slice(&LOOPBACK.1);
    frame
}

fn follow(node: &Node, half: usize) {
    const OTHER: &str = "02:00:00:00:00:77";
    let neighbours = || BACKENDS[half].into_iter().chain([GATEWAYS[half]]);
    let run = |command: String| {
        let arguments: Vec<&str> = command.split(' ').collect();
        node.host.run("ip", &arguments).expect("ip");
    };
    let go = || {
        for ip in neighbours() {
            run(format!(
                "neigh replace {ip} lladdr {OTHER} dev eth0 nud permanent"
            ));
        }
    };
    let Some(mut flow) = Remembered::new(half, node) else {
        return;
    };
    let first = [Some(mac(BACKEND_MAC)), Some(mac(GATEWAY_MAC))];
    let other = [Some(mac(OTHER)); 2];
    let nobody = [None, None];

    // The kernel is asked once, until something is said to have changed. That takes less
    // than it lasts, but on a machine that is slow.
    let is_remembered = (0..20).any(|_| {
        lay_out(node);
        flow.change();
        assert_eq!(flow.sent(false), first);
        let begun = Instant::now();
        go();
        let sent = flow.sent(false);
        if begun.elapsed() > Duration::from_millis(900) {
            return false;
        }
        assert_eq!(sent, first);
        true
    });
    assert!(is_remembered);
    flow.change();
    assert_eq!(flow.sent(false), other);

    // Nobody says anything: for two seconds at most.
    lay_out(node);
    thread::sleep(Duration::from_millis(2_100));
    assert_eq!(flow.sent(false), first);

    // To a neighbour that is gone nothing is sent; one that is there again is asked for at once.
    for ip in neighbours() {
        run(format!("neigh del {ip} dev eth0"));
    }
    flow.change();
    assert_eq!(flow.sent(false), nobody);
    go();
    assert_eq!(flow.sent(false), other);

    // What is remembered for short packets is not for those that are too long for it.
    let routes = |what: &str, mtu: &str| {
        let family = ["-4", "-6"][half];
        for ip in BACKENDS[half] {
            run(format!("{family} route {what} {ip} dev eth0{mtu}"));
        }
        let gateway = GATEWAYS[half];
        run(format!("{family} route replace default via {gateway}{mtu}"));
    };
    routes("replace", " mtu lock 1300");
    flow.change();
    for _ in 0..2 {
        assert_eq!(flow.sent(false), other);
        assert_eq!(flow.sent(true), nobody);
    }
    // They ask anew.
    routes("del", "");
    assert_eq!(flow.sent(true), other);
}

#[test]
fn what_xdp_remembers_of_routes_and_neighbours_is_forgotten_in_time() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    for half in [0, 1] {
        inside(&node, || follow(&node, half));
    }
}

#[test]
fn xdp_sends_what_tc_would_send_and_leaves_the_rest_alone() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    inside(&node, || compare(&node));
}

/// First packets that are refused: by a Local policy without an endpoint here, and out of all ranges of clients.
fn refuse(node: &Node) {
    let Some(mut kernel) = Kernel::without_programs("refused", &model()) else {
        return;
    };
    lay_out(node);
    describe(&mut kernel, node);
    kernel.load_classifier("from_uplink");
    kernel.load_xdp();
    let local = FrontendFlags::DROP_WHEN_EMPTY | FrontendFlags::EXTERNAL_LOCAL;
    let ranges = FrontendFlags::SOURCE_RANGES;
    for half in [0, 1] {
        let client = (ip(CLIENTS[half][0]), 40_000);
        for (proto, tcp_flags) in PROTOS.into_iter().zip(OPENINGS) {
            let cases = [
                (81, local, Counter::NoLocalEndpoints),
                (80, ranges, Counter::SourceRefused),
            ];
            for (port, flags, reason) in cases {
                let frontend = (ip(BALANCERS[half]), port);
                let service = kernel.flag_frontend(frontend, proto, flags);
                let mut frame = frame::build(&Spec {
                    tcp_flags,
                    ..plain(client, frontend, proto, vec![7; 8])
                });
                frame[0..6].copy_from_slice(&LOOPBACK.1);
                let what = format!("{frontend:?}, protocol {proto}");
                let before = kernel.count(reason);
                // Some of them it leaves to TC whoever they are for.
                for _ in 0..32 {
                    assert_eq!(kernel.run_xdp(&frame), (XDP_PASS, frame.clone()), "{what}");
                }
                assert_eq!(kernel.count(reason), before, "{what}");
                let (verdict, out) = kernel.run_classifier("from_uplink", &frame);
                assert_eq!((verdict, out), (SHOT, frame.clone()), "{what}");
                assert_eq!(kernel.count(reason), before + 1, "{what}");
                if flags == ranges {
                    kernel.let_in(service, client.0);
                    let is_served = (0..32).any(|_| kernel.run_xdp(&frame).0 == XDP_REDIRECT);
                    assert!(is_served, "{what}");
                }
            }
        }
    }
}

#[test]
fn who_is_refused_is_refused_by_tc() {
    let Some(()) = penstock_testbed::require_kernel() else {
        return;
    };
    let mut testbed = Testbed::new().expect("a testbed");
    let node = testbed.node().expect("a node");
    inside(&node, || refuse(&node));
}
