//! The programs at TC.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use penstock_common::{V4, V6};
use penstock_ebpf::family::Family;

use super::{
    ethertype,
    stages::*,
    trace,
    verdicts::{DROPPED, NEXT},
};

/// The kernel's verdict for a hook's.
#[inline(always)]
fn conclude(skb: *mut __sk_buff, verdict: i32) -> i32 {
    if verdict < DROPPED {
        return verdict;
    }
    trace(skb, verdict - DROPPED);
    TC_ACT_SHOT
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
        || towards_pod4(context.skb.skb),
        || towards_pod6(context.skb.skb),
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
