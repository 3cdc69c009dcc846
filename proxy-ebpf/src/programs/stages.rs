//! The stages of the packet hooks at TC, and the order in which a packet meets them.
//!
//! Each stage has a stack of its own, since a family's longest ways together do not fit into one, and is
//! a global function: the kernel checks it once, by itself, and not on every path that leads to it
//! (kernel commit 51c39bb1d5d1).

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use penstock_common::{Counter, Dialled, V4, V6};
use penstock_ebpf::{
    dialled,
    env::Env,
    external, forward, handover,
    pod::{self, Verdict},
    tunnel,
};

use super::{
    dropped,
    flows::{begin4, begin6},
    trace,
    verdicts::*,
};
use crate::kernel::{env::Kernel, skb::Skb};

/// A packet hook's functions for one family.
macro_rules! family {
    ($family:ty: $from_pod:ident, $onward:ident, $inward:ident, $uplinked:ident, $overlaid:ident, $into_pod:ident, $end:ident, $classify:ident,
        $request:ident, $open:ident, $refuse:ident, $icmp:ident, $node:ident, $returning:ident, $received:ident, $came:ident,
        $forward:ident, $deliver:ident, $held:ident, $masquerade:ident, $disguise:ident, $leave:ident,
        $from_overlay:ident, $to_overlay:ident, $from_uplink:ident,
        $unwrap:ident, $arrived:ident, $admit:ident, $outward:ident, $answer:ident, $shorten:ident, $to_uplink:ident, $sent:ident,
        $hand_over:ident, $split:ident, $rejoin:ident, $shorten_as_it_came:ident, $accept:ident, $admit_handed:ident,
        $hand_back:ident, $came_back:ident, $outbound:ident, $into_overlay:ident, $towards_pod:ident, $may_return:ident, $begin:ident) => {
        family!(stage $classify, pod::classify, $family);
        family!(stage $request, pod::request, $family);
        family!(stage $open, pod::open, $family);
        family!(stage $refuse, pod::refuse, $family);
        family!(stage $icmp, pod::error_about_reply, $family);
        family!(stage $node, pod::to_node, $family);
        family!(stage $returning, pod::returning, $family);
        family!(stage $received, dialled::received, $family);
        family!(stage $came, dialled::came, $family);
        family!(stage $forward, forward::from_pod, $family);
        family!(stage $deliver, forward::deliver, $family);
        family!(stage $held, forward::held_answer, $family);
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

        /// On from where it was decided where to.
        #[inline(always)]
        pub(super) fn $onward(context: &TcContext, decided: i32) -> i32 {
            let skb = context.skb.skb;
            let mut verdict = match decided {
                REQUEST | OUTSIDE | HELD_OUTSIDE => {
                    let mut verdict = $request(skb);
                    if verdict == OPEN && decided == REQUEST {
                        verdict = $open(skb);
                        if verdict == OPENING {
                            verdict = $disguise(skb);
                        }
                    } else if verdict == OPEN {
                        verdict = if decided == HELD_OUTSIDE {
                            $held(skb)
                        } else {
                            $answer(skb)
                        };
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
        pub(super) fn $uplinked(context: &TcContext, decided: i32) -> i32 {
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
        pub(super) fn $overlaid(context: &TcContext, decided: i32) -> i32 {
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
        pub(super) fn $inward(skb: *mut __sk_buff, decided: i32) -> i32 {
            let mut verdict = decided;
            if verdict == LOCAL {
                if $may_return(skb) {
                    match $returning(skb) {
                        UNTOUCHED => {}
                        NEXT => return $deliver(skb),
                        verdict => return verdict,
                    }
                }
                return match $came(skb) {
                    NEXT => $deliver(skb),
                    verdict => verdict,
                };
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

        /// [`pod::may_return`]: here, and not in a function of its own, which would cost more than it does.
        #[inline(always)]
        fn $may_return(skb: *mut __sk_buff) -> bool {
            let context = TcContext::new(skb);
            pod::may_return::<$family, _>(&Skb::peek(&context), &Kernel { context: &context })
        }

        /// From one pod of this node into another one, as the service's if it is a reply.
        #[inline(always)]
        pub(super) fn $into_pod(skb: *mut __sk_buff) -> i32 {
            match $returning(skb) {
                NEXT | UNTOUCHED => $deliver(skb),
                verdict => verdict,
            }
        }

        /// The last stage.
        #[inline(always)]
        pub(super) fn $end(context: &TcContext, verdict: i32) -> i32 {
            let skb = context.skb.skb;
            match verdict {
                LEAVE => match $leave(skb) {
                    TOO_LONG => $shorten(skb),
                    verdict => verdict,
                },
                TOO_LONG => $shorten(skb),
                // Nothing of ours after all.
                OUTSIDE | HELD_OUTSIDE | ICMP | UNTOUCHED | HAND_OVER => NEXT,
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
        pub(super) fn $outbound(skb: *mut __sk_buff) -> i32 {
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

        /// What the kernel sends to a pod.
        #[inline(always)]
        pub(super) fn $towards_pod(skb: *mut __sk_buff) -> i32 {
            if $may_return(skb) {
                let verdict = $returning(skb);
                if verdict != UNTOUCHED {
                    return verdict;
                }
            }
            let context = TcContext::new(skb);
            if dialled::is_noted(&Kernel { context: &context }, Dialled::BY_KERNEL) {
                $received(skb)
            } else {
                NEXT
            }
        }

        /// What enters the overlay.
        #[inline(always)]
        pub(super) fn $into_overlay(skb: *mut __sk_buff) -> i32 {
            match $to_overlay(skb) {
                REJOIN => $rejoin(skb),
                verdict => verdict,
            }
        }

        #[inline(always)]
        pub(super) fn $from_pod(context: &TcContext) -> i32 {
            let skb = context.skb.skb;
            // As `may_return`.
            if pod::is_kernels::<$family, _>(&Skb::peek(context), &Kernel { context }) {
                return NEXT;
            }
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
    returning4, received4, came4, forward4, deliver4, held4, masquerade4, disguise4, leave4, from_overlay4, to_overlay4,
    from_uplink4, unwrap4, arrived4, admit4, outward4, answer4, shorten4, to_uplink4, sent4,
    hand_over4, split4, rejoin4, shorten_as_it_came4, accept4, admit_handed4,
    hand_back4, came_back4, outbound4, into_overlay4, towards_pod4, may_return4, begin4);
family!(V6: from_pod6, onward6, inward6, uplinked6, overlaid6, into_pod6, end6, classify6, request6, open6, refuse6, icmp6, node6,
    returning6, received6, came6, forward6, deliver6, held6, masquerade6, disguise6, leave6, from_overlay6, to_overlay6,
    from_uplink6, unwrap6, arrived6, admit6, outward6, answer6, shorten6, to_uplink6, sent6,
    hand_over6, split6, rejoin6, shorten_as_it_came6, accept6, admit_handed6,
    hand_back6, came_back6, outbound6, into_overlay6, towards_pod6, may_return6, begin6);

/// What a stage answers to the hook.
#[inline(always)]
fn conclude_stage(
    context: &TcContext,
    kernel: &Kernel<'_, TcContext>,
    skb: &Skb<'_>,
    verdict: Verdict,
) -> i32 {
    match verdict {
        // All but the first are XDP's alone.
        Verdict::Pass | Verdict::Look | Verdict::Known(..) | Verdict::Seek(..) => NEXT,
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
        Verdict::HeldOutside => HELD_OUTSIDE,
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
