//! The program at XDP and its stages.

use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS},
        xdp_md,
    },
    macros::xdp,
    programs::XdpContext,
};
use penstock_common::{Counter, FlowId, V4, V6};
use penstock_ebpf::{
    family::Family,
    packet::Packet,
    pod::Verdict,
    xdp::{self, overlay},
};

use super::{
    dropped,
    flows::{begin4, begin6},
    trace_packet,
    verdicts::*,
};
use crate::kernel::{env::Kernel, xdp::Xdp};

/// XDP's functions for one family; their answers are as the other hooks'.
macro_rules! xdp_family {
    ($family:ty: $before_stack:ident, $unwrapped:ident, $sought:ident, $carry:ident, $look:ident, $seek:ident, $admit:ident, $begin:ident, $label:ident) => {
        xdp_family!(stage $carry, $family, (found: u32), |xdp, kernel| {
            let found = xdp::Found {
                is_found: found != NOT_FOUND,
                id: FlowId(found >> 1),
                is_reply: found & 1 != 0,
            };
            xdp::carry::<$family, _>(xdp, kernel, found)
        });
        xdp_family!(stage $look, $family, (), |xdp, kernel| {
            xdp::look::<$family, _>(xdp, kernel)
        });
        xdp_family!(stage $seek, $family, (found: u32), |xdp, kernel| {
            xdp::seek::<$family, _>(xdp, kernel, FlowId(found >> 1), found & 1 != 0)
        });
        xdp_family!(stage $admit, $family, (), |xdp, kernel| {
            xdp::open::<$family, _>(xdp, kernel)
        });

        /// [`overlay::label`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $label(xdp: *mut xdp_md) -> u64 {
            let context = XdpContext::new(xdp);
            let kernel = &Kernel { context: &context };
            overlay::label::<$family, _>(&Xdp::new(&context), kernel)
        }

        /// What came out of a tunnel: replies alone.
        #[inline(always)]
        fn $unwrapped(xdp: *mut xdp_md) -> i32 {
            let mut verdict = $carry(xdp, NOT_FOUND);
            if verdict == LOOK {
                verdict = $look(xdp);
                if (FOUND..SOUGHT).contains(&verdict) && (verdict - FOUND) & 1 != 0 {
                    verdict = $carry(xdp, (verdict - FOUND) as u32);
                }
            }
            $sought(xdp, verdict)
        }

        /// The end of both: asks for the way of packets of a flow, where that has to be asked for.
        #[inline(always)]
        fn $sought(xdp: *mut xdp_md, mut verdict: i32) -> i32 {
            if verdict >= SOUGHT {
                let found = (verdict - SOUGHT) as u32;
                verdict = $seek(xdp, found);
                if verdict == FORWARD {
                    verdict = $carry(xdp, found);
                }
            }
            // What was noted is no longer so, once more.
            if verdict >= FOUND { NEXT } else { verdict }
        }

        #[inline(always)]
        fn $before_stack(xdp: *mut xdp_md) -> i32 {
            let mut verdict = $carry(xdp, NOT_FOUND);
            if verdict == LOOK {
                verdict = $look(xdp);
                if verdict == OPEN {
                    verdict = $admit(xdp);
                    if verdict == OPENING {
                        verdict = $begin();
                    }
                    if verdict == OPENED {
                        verdict = $look(xdp);
                    }
                }
                if (FOUND..SOUGHT).contains(&verdict) {
                    verdict = $carry(xdp, (verdict - FOUND) as u32);
                }
            }
            $sought(xdp, verdict)
        }
    };
    (stage $name:ident, $family:ty, ($($argument:ident: u32)?), |$xdp:ident, $kernel:ident| $body:block) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $name(xdp: *mut xdp_md $(, $argument: u32)?) -> i32 {
            let context = XdpContext::new(xdp);
            let $kernel = &Kernel { context: &context };
            let $xdp = &mut Xdp::new(&context);
            match $body {
                Ok(Verdict::Routed(ifindex)) => $xdp.send(ifindex),
                Ok(Verdict::Open) => OPEN,
                Ok(Verdict::Opening) => OPENING,
                Ok(Verdict::Look) => LOOK,
                Ok(Verdict::Known(id, is_reply)) => FOUND + numbered(id, is_reply),
                Ok(Verdict::Seek(id, is_reply)) => SOUGHT + numbered(id, is_reply),
                Ok(Verdict::Forward) => FORWARD,
                Ok(Verdict::Wrapped) => WRAPPED,
                Ok(_) => NEXT,
                Err(reason) => dropped(&context, reason),
            }
        }
    };
}

/// A flow's direction in a number.
#[inline(always)]
fn numbered(id: FlowId, is_reply: bool) -> i32 {
    ((id.0 as i32) << 1) + i32::from(is_reply)
}

xdp_family!(V4: before_stack4, unwrapped4, sought4, carry4, look4, seek4, admit_at_xdp4, begin4, label4);
xdp_family!(V6: before_stack6, unwrapped6, sought6, carry6, look6, seek6, admit_at_xdp6, begin6, label6);

/// [`overlay::enclose`]; 0 where it is done.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn enclose(xdp: *mut xdp_md, label: u64) -> i32 {
    let context = XdpContext::new(xdp);
    let kernel = &Kernel { context: &context };
    i32::from(overlay::enclose(&mut Xdp::new(&context), kernel, label).is_err())
}

/// [`overlay::disclose`]; 0 where it is not done.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn disclose(xdp: *mut xdp_md) -> u32 {
    let context = XdpContext::new(xdp);
    let kernel = &Kernel { context: &context };
    let packet = &mut Xdp::new(&context);
    overlay::disclose(packet, kernel).map_or(0, u32::from)
}

/// [`overlay::restore`]; 0 where it is done.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn restore(xdp: *mut xdp_md) -> i32 {
    let context = XdpContext::new(xdp);
    i32::from(overlay::restore(&mut Xdp::new(&context)).is_err())
}

/// A tunnel's packet.
#[inline(always)]
fn wrapped(xdp: *mut xdp_md) -> i32 {
    let verdict = match disclose(xdp) as u16 {
        V4::ETHERTYPE => unwrapped4(xdp),
        V6::ETHERTYPE => unwrapped6(xdp),
        _ => return NEXT,
    };
    if verdict < 0 && restore(xdp) != 0 {
        return DROPPED + Counter::RewriteFailed as i32;
    }
    verdict
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

/// Packets from the outside, before anybody else has seen them.
#[xdp]
pub(crate) fn xdp_uplink(context: XdpContext) -> u32 {
    let packet = Xdp::new(&context);
    let mut verdict = match packet.load(12).map(u16::from_be) {
        Some(V4::ETHERTYPE) => before_stack4(context.ctx),
        Some(V6::ETHERTYPE) => before_stack6(context.ctx),
        _ => NEXT,
    };
    if verdict == WRAPPED {
        verdict = wrapped(context.ctx);
    }
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
