//! [`Packet`] for a socket buffer at a TC hook.
//!
//! Reads go straight to the packet's memory; writes go through helpers, which keep checksums right
//! that the interface or the receiver has yet to complete, and cost nothing where nothing is
//! written.
#![expect(unsafe_code, reason = "packet memory")]

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_DEC, BPF_F_ADJ_ROOM_DECAP_L3_IPV4, BPF_F_ADJ_ROOM_DECAP_L3_IPV6,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_INGRESS,
        BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, BPF_F_TUNINFO_IPV6,
        BPF_F_ZERO_CSUM_TX, bpf_adj_room_mode, bpf_tunnel_key,
    },
    helpers::generated::{
        bpf_check_mtu, bpf_csum_level, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect,
        bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_change_type, bpf_skb_get_tunnel_key, bpf_skb_pull_data, bpf_skb_set_tunnel_key,
        bpf_skb_store_bytes, bpf_skb_vlan_pop,
    },
    programs::TcContext,
};
use penstock_common::{Addr, Plain, Proto, Route, V4, V6, Vtep};
use penstock_ebpf::{
    checksum::Delta,
    family::{self, ETHERNET, Family},
    packet::{Covers, Packet, Refused, Zero},
    parse::tcp,
    sctp,
};

use super::unaligned;

/// As many bytes of each packet as the programs may look at: Ethernet, IPv6 with extensions, an
/// ICMP error's header, a quoted packet's headers.
const LOOKED_AT: u32 = 256;

/// `BPF_MTU_CHK_SEGS` of the kernel's uapi/linux/bpf.h: also look at the segments of a packet that
/// is yet to be cut.
const BPF_MTU_CHK_SEGS: u64 = 1;

/// The bits of a VLAN tag that name the VLAN (IEEE 802.1Q, 9.6); 0 where it says a priority alone.
const VLAN_ID: u32 = 0x0fff;

/// From the kernel's uapi/linux/if_packet.h, as the one below.
const PACKET_HOST: u32 = 0;
const PACKET_OTHERHOST: u32 = 3;

/// The part of a tunnel's key that all kernels know; later ones added a local address.
const TUNNEL_KEY: usize = offset_of!(bpf_tunnel_key, __bindgen_anon_2);

/// A socket buffer.
pub(crate) struct Skb<'a>(&'a TcContext);

impl<'a> Skb<'a> {
    /// Makes the first bytes of the packet readable.
    #[inline(always)]
    pub(crate) fn new(context: &'a TcContext) -> Self {
        let wanted = context.len().min(LOOKED_AT);
        if context.data() + wanted as usize > context.data_end() && !is_plain(context) {
            // Where it fails the headers are not found, and the packet is left to the kernel.
            // SAFETY: the context is the one that the kernel called this program with.
            unsafe { bpf_skb_pull_data(context.skb.skb, wanted) };
        }
        Self(context)
    }

    /// As much of the packet as is readable already.
    #[inline(always)]
    pub(crate) const fn peek(context: &'a TcContext) -> Self {
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

    /// Hands the packet to the pod behind an interface of this node.
    #[inline(always)]
    pub(crate) fn deliver(&self, ifindex: u32, is_shaped: bool) -> i32 {
        // SAFETY: both helpers take plain numbers.
        unsafe {
            if is_shaped {
                bpf_redirect(ifindex, 0) as i32
            } else {
                bpf_redirect_peer(ifindex, 0) as i32
            }
        }
    }

    /// Sends the packet out of an interface.
    #[inline(always)]
    pub(crate) fn send(&self, ifindex: u32) -> i32 {
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// Lets the packet come in by an interface.
    #[inline(always)]
    pub(crate) fn receive(&self, ifindex: u32) -> i32 {
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
    }

    /// Sends the packet out of an interface, to the neighbour that the kernel's routes say.
    #[inline(always)]
    pub(crate) fn route(&self, ifindex: u32) -> i32 {
        // SAFETY: without parameters the helper takes plain numbers.
        unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }

    /// Gives the packet a tunnel.
    #[inline(always)]
    pub(crate) fn tunnel(&self, route: &Route, vni: u32) -> Result<(), Refused> {
        // SAFETY: the structure is plain numbers.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        key.tunnel_id = vni;
        key.tunnel_ttl = 64;
        let flags = if route.underlay4.is_unspecified() {
            key.__bindgen_anon_1.remote_ipv6 = route.underlay6.raw();
            BPF_F_TUNINFO_IPV6
        } else {
            key.__bindgen_anon_1.remote_ipv4 = u32::from_be(route.underlay4.raw());
            // The inner packet has a checksum of its own (RFC 7348, 5).
            BPF_F_ZERO_CSUM_TX
        };
        // SAFETY: the helper reads `TUNNEL_KEY` bytes of the structure within this call.
        done(unsafe {
            bpf_skb_set_tunnel_key(
                self.0.skb.skb,
                &mut key,
                TUNNEL_KEY as u32,
                u64::from(flags),
            )
        })
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

/// Whether a packet is TCP or UDP without options and extensions, whose headers are readable already:
/// nobody looks at more of it, and making data readable copies it.
#[inline(always)]
fn is_plain(context: &TcContext) -> bool {
    let packet = Skb(context);
    let (ends, proto) = match u16::from_be(context.skb.protocol() as u16) {
        V4::ETHERTYPE => {
            let version_ihl: Option<u8> = packet.load(ETHERNET);
            // Version 4, five words of header.
            if version_ihl != Some(0x45) {
                return false;
            }
            (V4::HEADER, packet.load(ETHERNET + 9))
        }
        V6::ETHERTYPE => (V6::HEADER, packet.load(ETHERNET + 6)),
        _ => return false,
    };
    // As long as TCP's header, which is longer than UDP's.
    let last: Option<u16> = packet.load(ETHERNET + ends + tcp::HEADER - 2);
    last.is_some() && matches!(proto, Some(Proto::TCP | Proto::UDP))
}

/// Hides where a pointer comes from.
///
/// Otherwise the compiler drops a bounds check that another one implies, and the verifier, which
/// knows no such implication between two pointers, refuses the program.
#[inline(always)]
pub(super) fn opaque(mut pointer: usize) -> usize {
    // SAFETY: a register moved to itself. (Nothing at all would leave two line records at one place,
    // which the kernel refuses.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) pointer, options(pure, nomem, nostack));
    }
    pointer
}

/// [`Packet::extensions`], a global function.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extensions(skb: *mut __sk_buff, at: u32) -> u64 {
    let context = TcContext::new(skb);
    let skb = Skb(&context);
    // No network header begins behind the last transport header.
    family::extensions(&skb, at as usize & 0xff)
}

/// [`Packet::checksum_change`], a global function.
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn sctp_change(difference: u32, length: u32) -> u32 {
    sctp::change(difference, length)
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
        Some(unsafe { unaligned::read(start) })
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
    fn extensions(&self, at: usize) -> u64 {
        extensions(self.0.skb.skb, at as u32)
    }

    #[inline(always)]
    fn checksum_change(&self, difference: u32, length: u32) -> u32 {
        sctp_change(difference, length)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the program's own context.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn is_for_another_host(&self) -> bool {
        // SAFETY: a field of the program's own context.
        unsafe { (*self.0.skb.skb).pkt_type == PACKET_OTHERHOST }
    }

    #[inline(always)]
    fn fits(&self, ifindex: u32, mtu: u32) -> bool {
        if self.0.len() <= mtu + ETHERNET as u32 {
            return true;
        }
        // SAFETY: a field of the program's own context.
        if unsafe { (*self.0.skb.skb).gso_size } == 0 {
            return false;
        }
        self.fits_link(ifindex)
    }

    #[inline(always)]
    fn fits_link(&self, ifindex: u32) -> bool {
        let mut length = 0;
        // SAFETY: the context is the program's own, and `length` is written within this call.
        let result =
            unsafe { bpf_check_mtu(self.0.as_ptr(), ifindex, &mut length, 0, BPF_MTU_CHK_SEGS) };
        result == 0
    }

    #[inline(always)]
    fn is_joined(&self) -> bool {
        // SAFETY: a field of the program's own context.
        unsafe { (*self.0.skb.skb).gso_size != 0 }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: fields of the program's own context.
        unsafe { (*self.0.skb.skb).vlan_present != 0 && (*self.0.skb.skb).vlan_tci & VLAN_ID != 0 }
    }

    #[inline(always)]
    fn forget_priority(&mut self) {
        // SAFETY: a field of the program's own context, which the helper is called with.
        unsafe {
            if (*self.0.skb.skb).vlan_present != 0 {
                bpf_skb_vlan_pop(self.0.skb.skb);
            }
        }
    }

    #[inline(always)]
    fn reach(&mut self, length: usize) {
        if self.0.data() + length > self.0.data_end() {
            // Where it fails what is there is not found.
            // SAFETY: the context is the one that the kernel called this program with.
            unsafe { bpf_skb_pull_data(self.0.skb.skb, length as u32) };
        }
    }

    #[inline(always)]
    fn unwrap(&mut self, length: usize, ethertype: u16) -> Result<(), Refused> {
        let is_other = u32::from(ethertype.to_be()) != self.0.skb.protocol();
        // Before Linux 6.3 a packet of the other family is refused.
        let becomes = match ethertype {
            V4::ETHERTYPE if is_other => BPF_F_ADJ_ROOM_DECAP_L3_IPV4,
            V6::ETHERTYPE if is_other => BPF_F_ADJ_ROOM_DECAP_L3_IPV6,
            _ => 0,
        };
        // Segments stay as long as they are, and what was found out about checksums inside holds.
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET | becomes;
        // SAFETY: the helper checks the lengths.
        done(unsafe {
            bpf_skb_adjust_room(
                self.0.skb.skb,
                -(length as i32),
                bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
                u64::from(flags),
            )
        })?;
        if is_other {
            // What was just moved there is the packet's own to write to.
            let _ = self.write(ETHERNET - 2, &ethertype.to_be(), 0);
        }
        // The tunnel's checksum, zero included, was the first that the interface may have looked at.
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_csum_level(self.0.skb.skb, u64::from(BPF_CSUM_LEVEL_DEC)) };
        Ok(())
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.0.len() as usize
    }

    #[inline(always)]
    fn shift(&mut self, _: i32) -> Result<(), Refused> {
        // The kernel's own devices make tunnels.
        Err(Refused)
    }

    #[inline(always)]
    fn enclose(&mut self, _: u16) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn resize(&mut self, length: u32) -> Result<(), Refused> {
        // SAFETY: the helper checks the length.
        done(unsafe { bpf_skb_change_tail(self.0.skb.skb, length, 0) })
    }

    #[inline(always)]
    fn tunnel_source(&self) -> Option<Vtep> {
        // SAFETY: the structure is plain numbers.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        let skb = self.0.skb.skb;
        let mut ask = |flags: u32| {
            // SAFETY: the helper writes `TUNNEL_KEY` bytes of the structure within this call.
            done(unsafe {
                bpf_skb_get_tunnel_key(skb, &mut key, TUNNEL_KEY as u32, u64::from(flags))
            })
            .map(|()| key.__bindgen_anon_1)
        };
        if let Ok(remote) = ask(0) {
            // SAFETY: any bits are an address; the helper says that it is this one.
            let raw = unsafe { remote.remote_ipv4 }.to_be();
            return Some(Vtep {
                v4: V4::from_raw(raw),
                ..Vtep::default()
            });
        }
        let remote = ask(BPF_F_TUNINFO_IPV6).ok()?;
        // SAFETY: as above.
        let raw = unsafe { remote.remote_ipv6 };
        Some(Vtep {
            v6: V6::from_raw(raw),
            ..Vtep::default()
        })
    }

    #[inline(always)]
    fn tunnel_network(&self) -> Option<u32> {
        // SAFETY: the structure is plain numbers.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        let skb = self.0.skb.skb;
        let mut ask = |flags: u32| {
            // SAFETY: the helper writes `TUNNEL_KEY` bytes of the structure within this call.
            done(unsafe {
                bpf_skb_get_tunnel_key(skb, &mut key, TUNNEL_KEY as u32, u64::from(flags))
            })
            .map(|()| key.tunnel_id)
        };
        ask(0).or_else(|_| ask(BPF_F_TUNINFO_IPV6)).ok()
    }

    #[inline(always)]
    fn take_in(&mut self) -> Result<(), Refused> {
        // SAFETY: the helper takes plain numbers.
        done(unsafe { bpf_skb_change_type(self.0.skb.skb, PACKET_HOST) })
    }
}
