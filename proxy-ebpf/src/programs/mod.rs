//! The programs' entry points: each binds a kernel context to the library and its answer to the number
//! that the kernel expects.
#![expect(
    unsafe_code,
    reason = "global functions need names that are not mangled"
)]

use aya_ebpf::{EbpfContext, bindings::__sk_buff, programs::TcContext};
use penstock_common::{Counter, V4, V6};
use penstock_ebpf::{env::Env, family::Family, packet::Packet, pod};

use crate::kernel::{env::Kernel, skb::Skb};
use verdicts::DROPPED;

pub(crate) mod flows;
pub(crate) mod shared;
mod sockets;
mod stages;
mod tc;
mod verdicts;
pub(crate) mod xdp;

/// Counts a packet that goes no further.
#[inline(always)]
fn dropped<C: EbpfContext>(context: &C, reason: Counter) -> i32 {
    Kernel { context }.count(reason);
    DROPPED + reason as i32
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

/// A frame's protocol, host order.
#[inline(always)]
fn ethertype(context: &TcContext) -> u16 {
    u16::from_be(context.skb.protocol() as u16)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
