//! [`Packet`] for a socket buffer at a TC hook.
//!
//! Reads go straight to the packet's memory; writes go through helpers, which keep checksums right
//! that the interface or the receiver has yet to complete, and cost nothing where nothing is
//! written.
#![expect(unsafe_code, reason = "packet memory")]

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail,
        bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use penstock_common::Plain;
use penstock_ebpf::{
    checksum::Delta,
    packet::{Covers, Packet, Refused, Zero},
};

/// As many bytes of each packet as the programs may look at: Ethernet, IPv6 with extensions, an
/// ICMP error's header, a quoted packet's headers.
const LOOKED_AT: u32 = 256;

/// A socket buffer.
pub(crate) struct Skb<'a>(&'a TcContext);

impl<'a> Skb<'a> {
    /// Makes the first bytes of the packet readable.
    #[inline(always)]
    pub(crate) fn new(context: &'a TcContext) -> Self {
        let wanted = context.len().min(LOOKED_AT);
        if context.data() + wanted as usize > context.data_end() {
            // Where it fails the headers are not found, and the packet is left to the kernel.
            // SAFETY: the context is the one that the kernel called this program with.
            unsafe { bpf_skb_pull_data(context.skb.skb, wanted) };
        }
        Self(context)
    }

    /// Sends the packet out of the interface at whose hook it is.
    #[inline(always)]
    pub(crate) fn turn_around(&self) -> i32 {
        // SAFETY: a field of the program's own context.
        let ifindex = unsafe { (*self.0.skb.skb).ifindex };
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, at: usize, value: &T, flags: u64) -> Result<(), Refused> {
        // SAFETY: `value` is `size_of::<T>()` initialised bytes, `Plain` having no padding; the
        // helper checks the offset against the packet.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.0.as_ptr().cast(),
                at as u32,
                core::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
                flags,
            )
        };
        done(result)
    }
}

/// Hides where a pointer comes from.
///
/// Otherwise the compiler drops a bounds check that another one implies, and the verifier, which
/// knows no such implication between two pointers, refuses the program.
#[inline(always)]
fn opaque(mut pointer: usize) -> usize {
    // SAFETY: a register moved to itself. (Nothing at all would leave two line records at one place,
    // which the kernel refuses.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) pointer, options(pure, nomem, nostack));
    }
    pointer
}

#[inline(always)]
fn done(result: i64) -> Result<(), Refused> {
    if result == 0 { Ok(()) } else { Err(Refused) }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<T: Plain>(&self, at: usize) -> Option<T> {
        // A single byte that may be the packet's last proves nothing to the verifier, and no header
        // ends in a field of one byte.
        let length = if size_of::<T>() < 2 {
            2
        } else {
            size_of::<T>()
        };
        let start = opaque(self.0.data() + at);
        if start + length > self.0.data_end() {
            return None;
        }
        // SAFETY: the comparison above, which the verifier demands too, puts the whole value
        // inside the packet; any bytes are a `T`, and it is read unaligned.
        Some(unsafe { (start as *const T).read_unaligned() })
    }

    #[inline(always)]
    fn store<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused> {
        self.write(at, value, 0)
    }

    #[inline(always)]
    fn store_uncovered<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused> {
        // No header checksum makes up for the change in a sum over the whole packet that the
        // interface has handed up.
        self.write(at, value, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    #[inline(always)]
    fn change_header_checksum(&mut self, at: usize, delta: Delta) -> Result<(), Refused> {
        // SAFETY: the helper checks the offset; size 0 says that `to` is a difference.
        done(unsafe {
            bpf_l3_csum_replace(
                self.0.as_ptr().cast(),
                at as u32,
                0,
                u64::from(delta.to_wsum()),
                0,
            )
        })
    }

    #[inline(always)]
    fn change_checksum(
        &mut self,
        at: usize,
        delta: Delta,
        covers: Covers,
        zero: Zero,
    ) -> Result<(), Refused> {
        let covers = if covers == Covers::PseudoHeader {
            BPF_F_PSEUDO_HDR
        } else {
            0
        };
        let zero = if zero == Zero::MeansNone {
            BPF_F_MARK_MANGLED_0
        } else {
            0
        };
        // SAFETY: the helper checks the offset; size 0 says that `to` is a difference.
        done(unsafe {
            bpf_l4_csum_replace(
                self.0.as_ptr().cast(),
                at as u32,
                0,
                u64::from(delta.to_wsum()),
                u64::from(covers | zero),
            )
        })
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> Result<(), Refused> {
        // SAFETY: the helper checks the length.
        done(unsafe { bpf_skb_change_tail(self.0.skb.skb, length, 0) })
    }
}
