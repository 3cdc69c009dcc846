//! What the kernel's routes and neighbours say of a packet, at whichever hook it is.
#![expect(
    unsafe_code,
    reason = "the kernel's structure is shared with its helper"
)]

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext,
    bindings::bpf_fib_lookup as FibLookup,
    helpers::generated::bpf_fib_lookup,
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use penstock_common::{V4, V6};
use penstock_ebpf::{env::NextHop, family::ETHERNET};

use super::maps::WAYS;

/// From the kernel's uapi/linux/bpf.h, as those below.
const BPF_FIB_LKUP_RET_SUCCESS: i64 = 0;
const BPF_FIB_LKUP_RET_NO_NEIGH: i64 = 7;
const BPF_FIB_LKUP_RET_FRAG_NEEDED: i64 = 8;

/// A program's context.
pub(crate) trait Hook: EbpfContext {
    /// The packet's length to compare with what its way carries; 0 where the kernel has the buffer
    /// and compares by itself.
    #[inline(always)]
    fn length(&self) -> u16 {
        0
    }
}

impl Hook for TcContext {}
impl Hook for SockAddrContext {}
impl Hook for SockContext {}

impl Hook for XdpContext {
    #[inline(always)]
    fn length(&self) -> u16 {
        (self.data_end() - self.data()).saturating_sub(ETHERNET) as u16
    }
}

/// An address as the kernel's look-up of routes takes it.
pub(crate) trait Routable: Copy {
    /// AF_INET or AF_INET6.
    const FAMILY: u8;
    /// Writes both ends of a way.
    ///
    /// # Safety
    ///
    /// `way` points to a whole structure that nobody else uses.
    unsafe fn write(way: *mut FibLookup, src: Self, dst: Self);
}

impl Routable for V4 {
    const FAMILY: u8 = 2;

    #[inline(always)]
    unsafe fn write(way: *mut FibLookup, src: Self, dst: Self) {
        // SAFETY: as the caller promises.
        unsafe {
            addr_of_mut!((*way).__bindgen_anon_3.ipv4_src).write(src.raw());
            addr_of_mut!((*way).__bindgen_anon_4.ipv4_dst).write(dst.raw());
        }
    }
}

impl Routable for V6 {
    const FAMILY: u8 = 10;

    #[inline(always)]
    unsafe fn write(way: *mut FibLookup, src: Self, dst: Self) {
        // SAFETY: as the caller promises.
        unsafe {
            addr_of_mut!((*way).__bindgen_anon_3.ipv6_src).write(src.raw());
            addr_of_mut!((*way).__bindgen_anon_4.ipv6_dst).write(dst.raw());
        }
    }
}

/// Asks the kernel by what way it would forward a packet; its answer, in this CPU's room for it.
#[inline(always)]
fn ask<A: Routable>(
    hook: &impl Hook,
    ingress: u32,
    src: A,
    dst: A,
) -> Option<(i64, *const FibLookup)> {
    let way: *mut FibLookup = WAYS.get_ptr_mut(0)?.cast();
    // SAFETY: the element is this CPU's and as large as the structure; packet programs do not
    // interrupt each other, each running with softirqs off. The helper reads and writes it within
    // the call.
    let result = unsafe {
        addr_of_mut!((*way).family).write(A::FAMILY);
        addr_of_mut!((*way).l4_protocol).write(0);
        addr_of_mut!((*way).sport).write(0);
        addr_of_mut!((*way).dport).write(0);
        addr_of_mut!((*way).__bindgen_anon_1.tot_len).write(hook.length());
        addr_of_mut!((*way).ifindex).write(ingress);
        addr_of_mut!((*way).__bindgen_anon_2.rt_metric).write(0);
        A::write(way, src, dst);
        bpf_fib_lookup(hook.as_ptr(), way, size_of::<FibLookup>() as i32, 0)
    };
    Some((result, way))
}

/// The interface that the kernel would forward a packet by.
#[inline(always)]
pub(crate) fn egress<A: Routable>(hook: &impl Hook, ingress: u32, src: A, dst: A) -> Option<u32> {
    interface(ask(hook, ingress, src, dst)?, false)
}

/// The same for a packet that may be too long for its way, which somebody will be told of.
#[inline(always)]
pub(crate) fn egress_anyway<A: Routable>(
    hook: &impl Hook,
    ingress: u32,
    src: A,
    dst: A,
) -> Option<u32> {
    // Where it was told the length, the kernel ends before it says which interface.
    interface(ask(hook, ingress, src, dst)?, hook.length() == 0)
}

/// The interface that an answer names, also if that says, and may say, that the packet is too long for it.
#[inline(always)]
fn interface((result, way): (i64, *const FibLookup), may_be_long: bool) -> Option<u32> {
    let is_found = match result {
        // A neighbour that is not known yet is found by whoever sends.
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => true,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => may_be_long,
        _ => false,
    };
    // SAFETY: as in `ask`.
    is_found.then(|| unsafe { addr_of!((*way).ifindex).read() })
}

/// How long a packet may be on the way by which the kernel would forward it, in bytes, IP header included; 0
/// where there is none.
#[inline(always)]
pub(crate) fn mtu<A: Routable>(hook: &impl Hook, ingress: u32, src: A, dst: A) -> u32 {
    match ask(hook, ingress, src, dst) {
        Some((
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED,
            way,
            // SAFETY: as in `ask`.
        )) => unsafe { addr_of!((*way).__bindgen_anon_1.mtu_result).read() }.into(),
        _ => 0,
    }
}

/// The interface and the neighbour that the kernel would forward a packet to.
#[inline(always)]
pub(crate) fn next_hop<A: Routable>(
    hook: &impl Hook,
    ingress: u32,
    src: A,
    dst: A,
) -> Option<NextHop> {
    let (result, way) = ask(hook, ingress, src, dst)?;
    if result != BPF_FIB_LKUP_RET_SUCCESS {
        return None;
    }
    // SAFETY: as in `ask`.
    Some(unsafe {
        NextHop {
            ifindex: addr_of!((*way).ifindex).read(),
            to: addr_of!((*way).dmac).read(),
            from: addr_of!((*way).smac).read(),
            // In the place of the packet's length, which stays where the kernel is older than 5.12
            // (commit e1850ea9bd9e); 0 where it does not fit.
            mtu: u32::from(addr_of!((*way).__bindgen_anon_1.mtu_result).read())
                .max(hook.length().into()),
        }
    })
}
