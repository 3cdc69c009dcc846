//! The programs' entry points: each binds a kernel context to the library and its answer to the
//! number that the kernel expects.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(asm_experimental_arch, core_intrinsics)
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "compare-and-exchange")
)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(target_arch = "bpf")]
#[expect(
    unsafe_code,
    reason = "global functions need names that are not mangled"
)]
mod programs {
    use aya_ebpf::{
        EbpfContext, Global,
        bindings::{
            __sk_buff, TC_ACT_SHOT,
            xdp_action::{XDP_DROP, XDP_PASS},
            xdp_md,
        },
        macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
        programs::{SockAddrContext, SockContext, TcContext, XdpContext},
    };
    use penstock_common::{Counter, FlowId, V4, V6};
    use penstock_ebpf::{
        env::Env,
        external,
        family::Family,
        flow, forward, handover,
        packet::Packet,
        pod::{self, Verdict},
        quoted::{self, Quote},
        socket::{self, Outcome},
        tunnel, xdp,
    };

    use crate::kernel::{env::Kernel, skb::Skb, sock::HookSocket, xdp::Xdp};

    /// Leaves the packet to whoever is next at the hook, and else to the kernel.
    const NEXT: i32 = -1;

    /// A packet hook's functions for one family.
    ///
    /// Each stage has a stack of its own, since the family's longest ways together do not fit into
    /// one, and is a global function: the kernel checks it once, by itself, and not on every path
    /// that leads to it (kernel commit 51c39bb1d5d1).
    macro_rules! family {
        ($family:ty: $from_pod:ident, $onward:ident, $inward:ident, $uplinked:ident, $overlaid:ident, $into_pod:ident, $end:ident, $classify:ident,
            $request:ident, $open:ident, $refuse:ident, $icmp:ident, $node:ident, $returning:ident,
            $forward:ident, $deliver:ident, $masquerade:ident, $disguise:ident, $leave:ident,
            $from_overlay:ident, $to_overlay:ident, $from_uplink:ident,
            $unwrap:ident, $arrived:ident, $admit:ident, $outward:ident, $answer:ident, $shorten:ident, $to_uplink:ident, $sent:ident,
            $hand_over:ident, $split:ident, $rejoin:ident, $shorten_as_it_came:ident, $accept:ident, $admit_handed:ident,
            $hand_back:ident, $came_back:ident, $outbound:ident, $into_overlay:ident,
            $claim:ident, $place:ident, $search:ident, $take_over:ident, $enter:ident, $begin:ident) => {
            family!(stage $classify, pod::classify, $family);
            family!(stage $request, pod::request, $family);
            family!(stage $open, pod::open, $family);
            family!(stage $refuse, pod::refuse, $family);
            family!(stage $icmp, pod::error_about_reply, $family);
            family!(stage $node, pod::to_node, $family);
            family!(stage $returning, pod::returning, $family);
            family!(stage $forward, forward::from_pod, $family);
            family!(stage $deliver, forward::deliver, $family);
            family!(stage $masquerade, forward::masquerade, $family);
            family!(stage $disguise, forward::disguise, $family);
            family!(stage $leave, forward::leave, $family);
            family!(stage $from_overlay, forward::from_overlay, $family);
            family!(stage $to_overlay, forward::to_overlay, $family);
            family!(stage $from_uplink, external::from_uplink, $family);
            family!(stage $unwrap, tunnel::unwrap, $family);
            family!(stage $arrived, external::arrived, $family);
            family!(stage $admit, external::open, $family);
            family!(stage $outward, external::onward, $family);
            family!(stage $answer, external::answer, $family);
            family!(stage $shorten, external::shorten, $family);
            family!(stage $to_uplink, tunnel::to_uplink, $family);
            family!(stage $sent, tunnel::sent, $family);
            family!(stage $hand_over, handover::hand_over, $family);
            family!(stage $split, handover::split, $family);
            family!(stage $rejoin, handover::rejoin, $family);
            family!(stage $shorten_as_it_came, handover::shorten, $family);
            family!(stage $accept, handover::accept, $family);
            family!(stage $admit_handed, handover::open, $family);
            family!(stage $hand_back, handover::hand_back, $family);
            family!(stage $came_back, handover::came_back, $family);
            family!(step $claim(), flow::claim, $family);
            family!(step $place(id => FlowId(id)), flow::place, $family);
            family!(step $search(id => FlowId(id), from => from), flow::search, $family);
            family!(step $take_over(id => FlowId(id)), flow::take_over, $family);
            family!(step $enter(id => FlowId(id)), flow::enter, $family);

            /// Makes the flow that was decided on: a record, a source, both keys.
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $begin() -> i32 {
                let mut verdict = NO_RECORD;
                let mut turns = 0;
                while verdict == NO_RECORD && turns < MOST_CLAIMS.load() {
                    verdict = $claim();
                    turns += 1;
                }
                if verdict < CLAIMED {
                    return verdict;
                }
                let id = (verdict - CLAIMED) as u32;
                verdict = $place(id);
                turns = 0;
                while verdict >= SEARCH && turns < MOST_CHUNKS.load() {
                    verdict = $search(id, (verdict - SEARCH) as u32);
                    turns += 1;
                }
                if verdict == TAKE_OVER {
                    verdict = $take_over(id);
                }
                if verdict == PLACED {
                    verdict = $enter(id);
                }
                verdict
            }

            /// On from where it was decided where to.
            #[inline(always)]
            fn $onward(context: &TcContext, decided: i32) -> i32 {
                let skb = context.skb.skb;
                let mut verdict = match decided {
                    REQUEST | OUTSIDE => {
                        let mut verdict = $request(skb);
                        if verdict == OPEN && decided == REQUEST {
                            verdict = $open(skb);
                            if verdict == OPENING {
                                verdict = $disguise(skb);
                            }
                        } else if verdict == OPEN {
                            verdict = $answer(skb);
                            if verdict == OPEN {
                                verdict = $masquerade(skb);
                            }
                        }
                        if verdict == OPENING {
                            verdict = $begin();
                        }
                        if verdict == OPENED {
                            verdict = $request(skb);
                        }
                        verdict
                    }
                    ICMP => $icmp(skb),
                    verdict => verdict,
                };
                if matches!(verdict, FORWARD | UNTOUCHED) {
                    verdict = $forward(skb);
                }
                if verdict == HAND_BACK {
                    verdict = $hand_back(skb);
                }
                match verdict {
                    LOCAL => $into_pod(skb),
                    verdict => $end(context, verdict),
                }
            }

            /// On from where it was decided what came in by an interface to the outside.
            #[inline(always)]
            fn $uplinked(context: &TcContext, decided: i32) -> i32 {
                let skb = context.skb.skb;
                if decided == WRAPPED {
                    return $unwrap(skb);
                }
                let mut verdict = $inward(skb, decided);
                if verdict == HAND_OVER {
                    verdict = $hand_over(skb);
                }
                match verdict {
                    TOO_LONG_AS_IT_CAME => $shorten_as_it_came(skb),
                    SPLIT => $split(skb),
                    verdict => $end(context, verdict),
                }
            }

            /// On from where it was decided what came out of the overlay.
            #[inline(always)]
            fn $overlaid(context: &TcContext, decided: i32) -> i32 {
                let skb = context.skb.skb;
                if decided == CAME_BACK {
                    return $end(context, $came_back(skb));
                }
                let mut verdict = decided;
                if verdict == HANDED {
                    verdict = $accept(skb);
                    if verdict == OPEN {
                        verdict = $admit_handed(skb);
                        if verdict == OPENING {
                            verdict = $begin();
                        }
                        if verdict == OPENED {
                            verdict = $accept(skb);
                        }
                    }
                    if verdict == LOCAL {
                        return $deliver(skb);
                    }
                }
                $end(context, $inward(skb, verdict))
            }

            /// On from where it was decided what came in, up to what only one of the two hooks may meet.
            #[inline(always)]
            fn $inward(skb: *mut __sk_buff, decided: i32) -> i32 {
                let mut verdict = decided;
                if verdict == LOCAL {
                    return $into_pod(skb);
                }
                if verdict == ARRIVED {
                    verdict = $arrived(skb);
                }
                if verdict == REQUEST {
                    verdict = $request(skb);
                    if verdict == OPEN {
                        verdict = $admit(skb);
                        if verdict == OPENING {
                            verdict = $begin();
                        }
                        if verdict == OPENED {
                            verdict = $request(skb);
                        }
                    }
                } else if verdict == ICMP {
                    verdict = $icmp(skb);
                }
                if verdict == FORWARD {
                    verdict = $outward(skb);
                }
                match verdict {
                    LOCAL => $deliver(skb),
                    verdict => verdict,
                }
            }

            /// Into a pod of this node, as the service's if it is a reply.
            #[inline(always)]
            fn $into_pod(skb: *mut __sk_buff) -> i32 {
                match $returning(skb) {
                    NEXT => $deliver(skb),
                    verdict => verdict,
                }
            }

            /// The last stage.
            #[inline(always)]
            fn $end(context: &TcContext, verdict: i32) -> i32 {
                let skb = context.skb.skb;
                match verdict {
                    LEAVE => $leave(skb),
                    TOO_LONG => $shorten(skb),
                    // Nothing of ours after all.
                    OUTSIDE | ICMP | UNTOUCHED | HAND_OVER => NEXT,
                    // The flow was gone again before its first packet.
                    OPEN | OPENED => dropped(context, Counter::FlowRace),
                    NO_RECORD => dropped(context, Counter::FlowTableFull),
                    verdict if (REFUSED..CLAIMED).contains(&verdict) => {
                        trace(skb, verdict - REFUSED);
                        $refuse(skb)
                    }
                    verdict => verdict,
                }
            }

            /// What the kernel sends to the outside.
            #[inline(always)]
            fn $outbound(skb: *mut __sk_buff) -> i32 {
                let mut verdict = $to_uplink(skb);
                if verdict == ARRIVED {
                    verdict = $sent(skb);
                }
                if verdict == HAND_BACK {
                    verdict = $hand_back(skb);
                }
                // It is about to.
                if verdict == LEAVE { NEXT } else { verdict }
            }

            /// What enters the overlay.
            #[inline(always)]
            fn $into_overlay(skb: *mut __sk_buff) -> i32 {
                match $to_overlay(skb) {
                    REJOIN => $rejoin(skb),
                    verdict => verdict,
                }
            }

            #[inline(always)]
            fn $from_pod(context: &TcContext) -> i32 {
                let skb = context.skb.skb;
                let mut verdict = $classify(skb);
                if verdict == NODE {
                    verdict = $node(skb);
                }
                if verdict == FORWARD {
                    verdict = $forward(skb);
                }
                $onward(context, verdict)
            }
        };
        (step $name:ident($($argument:ident => $value:expr),*), flow::$path:ident, $family:ty) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name($($argument: u32),*) -> i32 {
                // None of these asks about the packet.
                let context = TcContext::new(core::ptr::null_mut());
                let kernel = Kernel { context: &context };
                match flow::$path::<$family, _>(&kernel $(, $value)*) {
                    Ok(Verdict::NoRecord) => NO_RECORD,
                    Ok(Verdict::Claimed(id)) => CLAIMED + id.0 as i32,
                    Ok(Verdict::Search(from)) => SEARCH + from as i32,
                    Ok(Verdict::TakeOver) => TAKE_OVER,
                    Ok(Verdict::Placed) => PLACED,
                    Ok(_) => OPENED,
                    Err(reason) => dropped(&context, reason),
                }
            }
        };
        (stage $name:ident, $module:ident::$path:ident, $family:ty) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name(skb: *mut __sk_buff) -> i32 {
                let context = TcContext::new(skb);
                let kernel = Kernel { context: &context };
                let mut skb = Skb::new(&context);
                match $module::$path::<$family, _>(&mut skb, &kernel) {
                    Ok(verdict) => conclude_stage(&context, &kernel, &skb, verdict),
                    Err(reason) => dropped(&context, reason),
                }
            }
        };
    }
    family!(V4: from_pod4, onward4, inward4, uplinked4, overlaid4, into_pod4, end4, classify4, request4, open4, refuse4, icmp4, node4,
        returning4, forward4, deliver4, masquerade4, disguise4, leave4, from_overlay4, to_overlay4,
        from_uplink4, unwrap4, arrived4, admit4, outward4, answer4, shorten4, to_uplink4, sent4,
        hand_over4, split4, rejoin4, shorten_as_it_came4, accept4, admit_handed4,
        hand_back4, came_back4, outbound4, into_overlay4,
        claim4, place4, search4, take_over4, enter4, begin4);
    family!(V6: from_pod6, onward6, inward6, uplinked6, overlaid6, into_pod6, end6, classify6, request6, open6, refuse6, icmp6, node6,
        returning6, forward6, deliver6, masquerade6, disguise6, leave6, from_overlay6, to_overlay6,
        from_uplink6, unwrap6, arrived6, admit6, outward6, answer6, shorten6, to_uplink6, sent6,
        hand_over6, split6, rejoin6, shorten_as_it_came6, accept6, admit_handed6,
        hand_back6, came_back6, outbound6, into_overlay6,
        claim6, place6, search6, take_over6, enter6, begin6);

    /// A function of [`pod`]'s for one family; no stage, but what several of them have in common.
    macro_rules! back {
        ($name:ident, $path:ident, $family:ty) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name(skb: *mut __sk_buff) -> i32 {
                let context = TcContext::new(skb);
                let mut skb = Skb::new(&context);
                let kernel = Kernel { context: &context };
                pod::encode_back(pod::$path::<$family, _>(&mut skb, &kernel))
            }
        };
    }
    /// What is done again and again in a flow's steps, for one family: the kernel checks it once, and not
    /// at each turn.
    macro_rules! turns {
        ($family:ty: $evict:ident, $take_port:ident, $evict_port:ident, $succeed:ident) => {
            turns!($evict(id), flow::evict, $family);
            turns!($take_port(id, port), flow::take_port, $family);
            turns!($evict_port(id, port), flow::evict_port, $family);
            turns!($succeed(id, port), flow::succession::succeed, $family);
        };
        ($name:ident(id $(, $port:ident)?), $path:path, $family:ty) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name(id: u32 $(, $port: u32)?) -> u32 {
                let context = TcContext::new(core::ptr::null_mut());
                let kernel = Kernel { context: &context };
                use $path as turn;
                turn::<$family, _>(&kernel, FlowId(id) $(, $port as u16)?).into()
            }
        };
    }
    turns!(V4: evict4, take_port4, evict_port4, succeed4);
    turns!(V6: evict6, take_port6, evict_port6, succeed6);

    /// What an ICMP error quotes, and how it is translated, for one family.
    macro_rules! quoted {
        ($family:ty: $look:ident, $requote:ident) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $look(skb: *mut __sk_buff) -> u32 {
                let context = TcContext::new(skb);
                quoted::look::<$family>(&Skb::new(&context))
            }

            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $requote(
                skb: *mut __sk_buff,
                quote: u32,
                id: u32,
                is_about_request: u32,
            ) -> u32 {
                let context = TcContext::new(skb);
                let mut skb = Skb::new(&context);
                let kernel = Kernel { context: &context };
                let Some(quote) = Quote::from_bits(quote) else {
                    return 0;
                };
                let is_about_request = is_about_request != 0;
                quoted::requote::<$family, _>(
                    &mut skb,
                    &kernel,
                    quote,
                    FlowId(id),
                    is_about_request,
                )
                .into()
            }
        };
    }
    quoted!(V4: quote4, requote4);
    quoted!(V6: quote6, requote6);

    back!(back4, back_itself, V4);
    back!(back6, back_itself, V6);
    back!(about_request4, about_request, V4);
    back!(about_request6, about_request, V6);

    /// XDP's functions for one family; their answers are as the other hooks'.
    macro_rules! xdp_family {
        ($family:ty: $before_stack:ident, $carry:ident, $admit:ident, $begin:ident) => {
            xdp_family!(stage $carry, xdp::carry, $family);
            xdp_family!(stage $admit, xdp::open, $family);

            #[inline(always)]
            fn $before_stack(xdp: *mut xdp_md) -> i32 {
                let mut verdict = $carry(xdp);
                if verdict == OPEN {
                    verdict = $admit(xdp);
                    if verdict == OPENING {
                        verdict = $begin();
                    }
                    if verdict == OPENED {
                        verdict = $carry(xdp);
                    }
                }
                verdict
            }
        };
        (stage $name:ident, $module:ident::$path:ident, $family:ty) => {
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name(xdp: *mut xdp_md) -> i32 {
                let context = XdpContext::new(xdp);
                let kernel = Kernel { context: &context };
                let mut xdp = Xdp::new(&context);
                match $module::$path::<$family, _>(&mut xdp, &kernel) {
                    Ok(Verdict::Routed(ifindex)) => xdp.send(ifindex),
                    Ok(Verdict::Open) => OPEN,
                    Ok(Verdict::Opening) => OPENING,
                    Ok(_) => NEXT,
                    Err(reason) => dropped(&context, reason),
                }
            }
        };
    }
    xdp_family!(V4: before_stack4, carry4, admit_at_xdp4, begin4);
    xdp_family!(V6: before_stack6, carry6, admit_at_xdp6, begin6);

    // Between the functions of a hook: see `Verdict`. None is a verdict of the kernel's.
    const WRAPPED: i32 = -26;
    const TOO_LONG_AS_IT_CAME: i32 = -25;
    const HAND_OVER: i32 = -24;
    const SPLIT: i32 = -23;
    const REJOIN: i32 = -22;
    const HANDED: i32 = -21;
    const HAND_BACK: i32 = -20;
    const CAME_BACK: i32 = -19;
    const NO_RECORD: i32 = -18;
    const OPENING: i32 = -17;
    const PLACED: i32 = -16;
    const TAKE_OVER: i32 = -15;
    const TOO_LONG: i32 = -14;
    const UNTOUCHED: i32 = -13;
    const ARRIVED: i32 = -12;
    const OUTSIDE: i32 = -11;
    const LEAVE: i32 = -10;
    const LOCAL: i32 = -9;
    const FORWARD: i32 = -8;
    const REQUEST: i32 = -7;
    const ICMP: i32 = -6;
    const NODE: i32 = -5;
    const OPEN: i32 = -4;
    const OPENED: i32 = -3;
    // Plus the `Counter` that says why.
    const DROPPED: i32 = 1_000;
    const REFUSED: i32 = 2_000;
    // Plus the `FlowId`.
    const CLAIMED: i32 = 1 << 20;
    // Plus the chunk.
    const SEARCH: i32 = 1 << 20;

    /// How often a record is looked for. For the verifier to count, as below.
    #[unsafe(no_mangle)]
    static MOST_CLAIMS: Global<u32> = Global::new(16);
    /// More than a range of ports has chunks.
    #[unsafe(no_mangle)]
    static MOST_CHUNKS: Global<u32> = Global::new(512);

    /// What a stage answers to the hook.
    #[inline(always)]
    fn conclude_stage(
        context: &TcContext,
        kernel: &Kernel<'_, TcContext>,
        skb: &Skb<'_>,
        verdict: Verdict,
    ) -> i32 {
        match verdict {
            Verdict::Pass => NEXT,
            Verdict::TurnAround => skb.turn_around(),
            Verdict::Open => OPEN,
            Verdict::Opening => OPENING,
            // Only flows' own stages say more.
            Verdict::Opened
            | Verdict::NoRecord
            | Verdict::Claimed(_)
            | Verdict::Search(_)
            | Verdict::TakeOver
            | Verdict::Placed => OPENED,
            Verdict::Refuse(reason) => REFUSED + reason as i32,
            Verdict::Forward => FORWARD,
            Verdict::Local => LOCAL,
            Verdict::Deliver { ifindex, is_shaped } => skb.deliver(ifindex, is_shaped),
            Verdict::Outside => OUTSIDE,
            Verdict::Request => REQUEST,
            Verdict::Node => NODE,
            Verdict::Icmp => ICMP,
            Verdict::Wrapped => WRAPPED,
            Verdict::Arrived => ARRIVED,
            Verdict::Untouched => UNTOUCHED,
            Verdict::Leave => LEAVE,
            Verdict::In(ifindex) => skb.receive(ifindex),
            Verdict::TooLong => TOO_LONG,
            Verdict::TooLongAsItCame => TOO_LONG_AS_IT_CAME,
            Verdict::HandOver => HAND_OVER,
            Verdict::Split => SPLIT,
            Verdict::Rejoin => REJOIN,
            Verdict::Handed => HANDED,
            Verdict::HandBack => HAND_BACK,
            Verdict::CameBack => CAME_BACK,
            Verdict::Routed(ifindex) => skb.route(ifindex),
            Verdict::Tunnel(route) => match skb.tunnel(&route, kernel.overlay().vni) {
                Ok(()) => NEXT,
                Err(_) => dropped(context, Counter::RewriteFailed),
            },
            Verdict::Overlay(route) => {
                let overlay = kernel.overlay();
                match skb.tunnel(&route, overlay.vni) {
                    Ok(()) => skb.send(overlay.ifindex),
                    Err(_) => dropped(context, Counter::RewriteFailed),
                }
            }
        }
    }

    /// Counts a packet that goes no further.
    #[inline(always)]
    fn dropped<C: EbpfContext>(context: &C, reason: Counter) -> i32 {
        Kernel { context }.count(reason);
        DROPPED + reason as i32
    }

    /// The kernel's verdict for a hook's.
    #[inline(always)]
    fn conclude(skb: *mut __sk_buff, verdict: i32) -> i32 {
        if verdict < DROPPED {
            return verdict;
        }
        trace(skb, verdict - DROPPED);
        TC_ACT_SHOT
    }

    /// Traces why a packet goes no further, on a stack of its own: a record needs as much as a
    /// packet's longest way.
    #[inline(never)]
    fn trace(skb: *mut __sk_buff, reason: i32) -> i32 {
        let context = TcContext::new(skb);
        trace_packet(
            &context,
            &Skb::new(&context),
            ethertype(&context),
            reason as u32,
        )
    }

    /// The same at XDP. Of a function that is not global the compiler would make one of the frame's
    /// pointers, which no function may be given.
    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(crate) extern "C" fn trace_frame(xdp: *mut xdp_md, reason: i32) -> i32 {
        let context = XdpContext::new(xdp);
        let frame = Xdp::new(&context);
        let ethertype = frame.load(12).map_or(0, u16::from_be);
        trace_packet(&context, &frame, ethertype, reason as u32)
    }

    #[inline(always)]
    fn trace_packet<C: EbpfContext>(
        context: &C,
        packet: &impl Packet,
        ethertype: u16,
        reason: u32,
    ) -> i32 {
        let (proto, port) = match ethertype {
            V4::ETHERTYPE => pod::destination::<V4>(packet),
            V6::ETHERTYPE => pod::destination::<V6>(packet),
            _ => Default::default(),
        };
        Kernel { context }.trace_index(reason, proto, port.to_host());
        0
    }

    /// Packets that a pod sends, at the host end of its interface.
    #[classifier]
    pub(crate) fn from_pod(context: TcContext) -> i32 {
        by_family(&context, || from_pod4(&context), || from_pod6(&context))
    }

    /// Packets on their way to a pod, at the host end of its interface.
    #[classifier]
    pub(crate) fn to_pod(context: TcContext) -> i32 {
        by_family(
            &context,
            || returning4(context.skb.skb),
            || returning6(context.skb.skb),
        )
    }

    /// Packets that another node sent through the overlay.
    #[classifier]
    pub(crate) fn from_overlay(context: TcContext) -> i32 {
        by_family(
            &context,
            || overlaid4(&context, from_overlay4(context.skb.skb)),
            || overlaid6(&context, from_overlay6(context.skb.skb)),
        )
    }

    /// Packets from the outside.
    #[classifier]
    pub(crate) fn from_uplink(context: TcContext) -> i32 {
        by_family(
            &context,
            || uplinked4(&context, from_uplink4(context.skb.skb)),
            || uplinked6(&context, from_uplink6(context.skb.skb)),
        )
    }

    /// Packets from the outside, before anybody else has seen them.
    #[xdp]
    pub(crate) fn xdp_uplink(context: XdpContext) -> u32 {
        let packet = Xdp::new(&context);
        let verdict = match packet.load(12).map(u16::from_be) {
            Some(V4::ETHERTYPE) => before_stack4(context.ctx),
            Some(V6::ETHERTYPE) => before_stack6(context.ctx),
            _ => NEXT,
        };
        match verdict {
            // What was not sent, begun or not, is the TC hook's.
            ..0 => XDP_PASS,
            DROPPED.. => {
                trace_frame(context.ctx, verdict - DROPPED);
                XDP_DROP
            }
            verdict => verdict as u32,
        }
    }

    /// Packets that leave for the outside.
    #[classifier]
    pub(crate) fn to_uplink(context: TcContext) -> i32 {
        by_family(
            &context,
            || outbound4(context.skb.skb),
            || outbound6(context.skb.skb),
        )
    }

    /// Packets about to enter the overlay.
    #[classifier]
    pub(crate) fn to_overlay(context: TcContext) -> i32 {
        by_family(
            &context,
            || into_overlay4(context.skb.skb),
            || into_overlay6(context.skb.skb),
        )
    }

    /// What the family's functions make of a packet, as the kernel's verdict.
    #[inline(always)]
    fn by_family(context: &TcContext, v4: impl FnOnce() -> i32, v6: impl FnOnce() -> i32) -> i32 {
        let verdict = match ethertype(context) {
            V4::ETHERTYPE => v4(),
            V6::ETHERTYPE => v6(),
            _ => NEXT,
        };
        conclude(context.skb.skb, verdict)
    }

    /// A frame's protocol, host order.
    #[inline(always)]
    fn ethertype(context: &TcContext) -> u16 {
        u16::from_be(context.skb.protocol() as u16)
    }

    /// What a socket hook does with an outcome.
    #[inline(always)]
    fn allow(socket: &HookSocket<'_>, outcome: Outcome) -> i32 {
        match outcome {
            Outcome::Proceed => 1,
            Outcome::Fail(errno) => socket.fail(errno),
        }
    }

    /// connect(2) of an IPv4 socket.
    #[cgroup_sock_addr(connect4)]
    pub(crate) fn connect4(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v4(&context);
        let addr = socket.addr4();
        let outcome = socket::connect::<V4, _>(&mut socket, &Kernel { context: &context }, addr);
        allow(&socket, outcome)
    }

    /// connect(2) of an IPv6 socket, to either family.
    #[cgroup_sock_addr(connect6)]
    pub(crate) fn connect6(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v6(&context);
        let kernel = Kernel { context: &context };
        let addr = socket.addr6();
        let outcome = match addr.to_mapped_v4() {
            Some(addr) => socket::connect::<V4, _>(&mut socket, &kernel, addr),
            None => socket::connect::<V6, _>(&mut socket, &kernel, addr),
        };
        allow(&socket, outcome)
    }

    /// sendmsg(2) of an unconnected IPv4 UDP socket.
    #[cgroup_sock_addr(sendmsg4)]
    pub(crate) fn sendmsg4(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v4(&context);
        let addr = socket.addr4();
        let outcome = socket::send::<V4, _>(&mut socket, &Kernel { context: &context }, addr);
        allow(&socket, outcome)
    }

    /// sendmsg(2) of an unconnected IPv6 UDP socket, to either family.
    #[cgroup_sock_addr(sendmsg6)]
    pub(crate) fn sendmsg6(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v6(&context);
        let kernel = Kernel { context: &context };
        let addr = socket.addr6();
        let outcome = match addr.to_mapped_v4() {
            Some(addr) => socket::send::<V4, _>(&mut socket, &kernel, addr),
            None => socket::send::<V6, _>(&mut socket, &kernel, addr),
        };
        allow(&socket, outcome)
    }

    /// recvmsg(2) of an IPv4 UDP socket.
    #[cgroup_sock_addr(recvmsg4)]
    pub(crate) fn recvmsg4(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v4(&context);
        let from = socket.named();
        socket::receive(&mut socket, from);
        1
    }

    /// recvmsg(2) of an IPv6 UDP socket.
    #[cgroup_sock_addr(recvmsg6)]
    pub(crate) fn recvmsg6(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v6(&context);
        let from = socket.named();
        socket::receive(&mut socket, from);
        1
    }

    /// getpeername(2) of an IPv4 socket.
    #[cgroup_sock_addr(getpeername4)]
    pub(crate) fn getpeername4(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v4(&context);
        let name = socket.named();
        socket::peer_name(&mut socket, name);
        1
    }

    /// getpeername(2) of an IPv6 socket.
    #[cgroup_sock_addr(getpeername6)]
    pub(crate) fn getpeername6(context: SockAddrContext) -> i32 {
        let mut socket = HookSocket::v6(&context);
        let name = socket.named();
        socket::peer_name(&mut socket, name);
        1
    }

    /// The last close of a socket.
    #[cgroup_sock(sock_release)]
    pub(crate) fn sock_release(context: SockContext) -> i32 {
        crate::kernel::sock::released(&context);
        1
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    // For the host this crate is a library; its programs exist only for the kernel.
}
