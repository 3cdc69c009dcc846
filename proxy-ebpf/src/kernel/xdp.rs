//! [`Packet`] for a frame at XDP, where there is memory and nothing else.
//!
//! Checksums are changed in place: a checksum that a sender has left to its interface would need
//! the kernel's help, so that such packets are told apart before anything is changed
//! (`penstock_ebpf::xdp`).
#![expect(unsafe_code, reason = "packet memory")]

use aya_ebpf::{
    bindings::xdp_action::XDP_TX,
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_head},
    programs::XdpContext,
};
use penstock_common::{Plain, V4};
use penstock_ebpf::{
    checksum::Delta,
    family::{ETHERNET, Family},
    packet::{Covers, Packet, Refused, Zero},
};

use super::{
    maps::XDP_UPLINKS,
    skb::{opaque, sctp_change},
    unaligned,
};
use crate::programs::xdp::{enclose, label4, label6};

/// A frame.
pub(crate) struct Xdp<'a>(&'a XdpContext);

impl<'a> Xdp<'a> {
    /// The frame that the program was called for.
    #[inline(always)]
    pub(crate) fn new(context: &'a XdpContext) -> Self {
        Self(context)
    }

    /// Sends the frame, whose Ethernet addresses are right, out of an interface.
    #[inline(always)]
    pub(crate) fn send(&self, ifindex: u32) -> i32 {
        if ifindex == self.ifindex() {
            return XDP_TX as i32;
        }
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// The address of a `T` inside the frame.
    #[inline(always)]
    fn at<T: Plain>(&self, at: usize) -> Option<usize> {
        // As in `Skb::load`: one byte at the end proves nothing to the verifier.
        let length = if size_of::<T>() < 2 {
            2
        } else {
            size_of::<T>()
        };
        let start = opaque(self.0.data() + at);
        (start + length <= self.0.data_end()).then_some(start)
    }
}

impl Packet for Xdp<'_> {
    #[inline(always)]
    fn load<T: Plain>(&self, at: usize) -> Option<T> {
        let start = self.at::<T>(at)?;
        // SAFETY: the whole value is inside the frame; any bytes are a `T`, and it is read unaligned.
        Some(unsafe { unaligned::read(start) })
    }

    #[inline(always)]
    fn store<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused> {
        let start = self.at::<T>(at).ok_or(Refused)?;
        // SAFETY: the whole value is inside the frame, which is this program's alone, and is written
        // unaligned.
        unsafe { unaligned::write(start, value) };
        Ok(())
    }

    #[inline(always)]
    fn store_uncovered<T: Plain>(&mut self, at: usize, value: &T) -> Result<(), Refused> {
        self.store(at, value)
    }

    #[inline(always)]
    fn change_header_checksum(&mut self, at: usize, delta: Delta) -> Result<(), Refused> {
        let checksum = self.load(at).ok_or(Refused)?;
        self.store(at, &delta.apply(checksum))
    }

    #[inline(always)]
    fn change_checksum(
        &mut self,
        at: usize,
        delta: Delta,
        _: Covers,
        zero: Zero,
    ) -> Result<(), Refused> {
        let checksum: u16 = self.load(at).ok_or(Refused)?;
        let is_udp = zero == Zero::MeansNone;
        if is_udp && checksum == 0 {
            return Ok(());
        }
        let changed = match delta.apply(checksum) {
            0 if is_udp => 0xffff,
            changed => changed,
        };
        self.store(at, &changed)
    }

    #[inline(always)]
    fn extensions(&self, _: usize) -> u64 {
        // What has any is the TC hook's.
        0
    }

    #[inline(always)]
    fn checksum_change(&self, difference: u32, length: u32) -> u32 {
        sctp_change(difference, length)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the program's own context.
        unsafe { (*self.0.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn is_for_another_host(&self) -> bool {
        let Some(uplink) = XDP_UPLINKS.get_ptr(self.ifindex()) else {
            return true;
        };
        // SAFETY: RCU keeps the element mapped; it is copied out once, and any bytes are one.
        let uplink = unsafe { uplink.read_volatile() };
        self.load::<[u8; 6]>(0) != Some(uplink.mac)
    }

    #[inline(always)]
    fn fits(&self, _: u32, mtu: u32) -> bool {
        self.0.data_end() - self.0.data() <= mtu as usize + ETHERNET
    }

    #[inline(always)]
    fn is_joined(&self) -> bool {
        false
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // What it is attached to carries none.
        false
    }

    #[inline(always)]
    fn forget_priority(&mut self) {}

    #[inline(always)]
    fn reach(&mut self, _: usize) {}

    #[inline(always)]
    fn unwrap(&mut self, _: usize, _: u16) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.0.data_end() - self.0.data()
    }

    #[inline(always)]
    fn shift(&mut self, by: i32) -> Result<(), Refused> {
        // SAFETY: the context is the one that the kernel called this program with; all pointers into the
        // frame are made anew from it.
        match unsafe { bpf_xdp_adjust_head(self.0.ctx, by) } {
            0 => Ok(()),
            _ => Err(Refused),
        }
    }

    #[inline(always)]
    fn enclose(&mut self, ethertype: u16) -> Result<(), Refused> {
        // One after the other, so that neither needs the other's stack.
        let label = if ethertype == V4::ETHERTYPE {
            label4(self.0.ctx)
        } else {
            label6(self.0.ctx)
        };
        if label == 0 || enclose(self.0.ctx, label) != 0 {
            return Err(Refused);
        }
        Ok(())
    }

    #[inline(always)]
    fn resize(&mut self, _: u32) -> Result<(), Refused> {
        // Nothing that changes where a frame ends is done here.
        Err(Refused)
    }

    #[inline(always)]
    fn take_in(&mut self) -> Result<(), Refused> {
        // Nothing comes out of a tunnel here.
        Err(Refused)
    }
}
