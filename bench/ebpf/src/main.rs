//! The programs: one makes frames and sends them, one counts what came of them and goes no further.
//!
//! Both run at XDP at the end of a link whose other end is the measured node's, so that a frame is
//! received by the node as from a wire, and what the node sends is looked at and dropped at once.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "frames' and maps' memory")]
mod programs {
    use aya_ebpf::{
        bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
        helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
        macros::{map, xdp},
        maps::{Array, PerCpuArray},
        programs::XdpContext,
    };
    use penstock_bench_ebpf::{Expected, LENGTH, MARK, MARK_AT, Plan, TCP, Window, at, count};

    /// Of how many forwarded frames one is noted and kept to be looked at: a power of two.
    const NOTED: u64 = 256;

    #[map]
    static PLAN: Array<Plan> = Array::with_max_entries(1, 0);
    #[map]
    static EXPECTED: Array<Expected> = Array::with_max_entries(1, 0);
    #[map]
    static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::ALL, 0);
    /// A frame that came out as it should, as it lies in memory.
    #[map]
    static SAMPLE: Array<[u64; LENGTH / 8]> = Array::with_max_entries(1, 0);
    #[map]
    static WINDOW: Array<Window> = Array::with_max_entries(1, 0);

    /// Where the frame begins, if it is as long as all of them.
    #[inline(always)]
    fn frame(context: &XdpContext) -> Option<usize> {
        let start = context.data();
        (start + LENGTH <= context.data_end()).then_some(start)
    }

    /// Counts one more, and says how many there were before.
    #[inline(always)]
    fn one_more(index: u32) -> u64 {
        let Some(counter) = COUNTS.get_ptr_mut(index) else {
            return 0;
        };
        // SAFETY: this processor's own element, while no other program runs on it.
        unsafe {
            let before = *counter;
            *counter = before + 1;
            before
        }
    }

    /// Makes the next frame and sends it. What is in the frame before may be any earlier one's rest,
    /// since the kernel uses pages again.
    #[xdp]
    pub(crate) fn generate(context: XdpContext) -> u32 {
        let (Some(start), Some(plan)) = (frame(&context), PLAN.get_ptr(0)) else {
            return XDP_ABORTED;
        };
        // SAFETY: user space wrote it before the first run and does not again.
        let plan = unsafe { &*plan };
        let number = one_more(count::SENT) as u32;
        let new = plan.variation(number);
        // SAFETY: all of it is inside the frame, by the comparison in `frame`; fields lie anywhere.
        unsafe {
            (start as *mut [u64; LENGTH / 8]).write_unaligned(plan.frame);
            ((start + at::SOURCE + 2) as *mut [u8; 2]).write_unaligned(new.host);
            ((start + at::SOURCE_PORT) as *mut [u8; 2]).write_unaligned(new.port);
            ((start + at::HEADER_CHECKSUM) as *mut [u8; 2]).write_unaligned(new.header_checksum);
            if plan.protocol == u32::from(TCP) {
                ((start + at::TCP_CHECKSUM) as *mut [u8; 2])
                    .write_unaligned(new.transport_checksum);
            } else {
                ((start + at::UDP_CHECKSUM) as *mut [u8; 2])
                    .write_unaligned(new.transport_checksum);
            }
        }
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(plan.interface, 0) as u32 }
    }

    /// Counts and drops what the node sent of them; lets everything else through.
    #[xdp]
    pub(crate) fn swallow(context: XdpContext) -> u32 {
        let Some(start) = frame(&context) else {
            return XDP_PASS;
        };
        // SAFETY: inside the frame, by the comparison in `frame`; any bytes will do, read unaligned.
        let (mark, found) = unsafe {
            (
                ((start + MARK_AT) as *const u64).read_unaligned(),
                Expected {
                    source: ((start + at::SOURCE) as *const [u8; 4]).read_unaligned(),
                    mask: [0xff; 4],
                    destination: ((start + at::DESTINATION) as *const [u8; 4]).read_unaligned(),
                    port: ((start + at::DESTINATION_PORT) as *const [u8; 2]).read_unaligned(),
                    protocol: ((start + at::PROTOCOL) as *const u8).read_unaligned(),
                    ttl: ((start + at::TTL) as *const u8).read_unaligned(),
                },
            )
        };
        if mark != u64::from_ne_bytes(MARK) {
            return XDP_PASS;
        }
        // SAFETY: user space wrote it before the first frame and does not again.
        let is_right = EXPECTED
            .get_ptr(0)
            .is_some_and(|expected| unsafe { (*expected).is_met_by(&found) });
        if !is_right {
            one_more(count::WRONG);
            return XDP_DROP;
        }
        let before = one_more(count::FORWARDED);
        if before.is_multiple_of(NOTED)
            && let (Some(sample), Some(window)) = (SAMPLE.get_ptr_mut(0), WINDOW.get_ptr_mut(0))
        {
            // SAFETY: the frame is as long as that; elements are this program's, which runs on one
            // processor, until user space reads them after the last frame. The helper takes nothing.
            unsafe {
                *sample = (start as *const [u64; LENGTH / 8]).read_unaligned();
                (*window).note(before, bpf_ktime_get_ns());
            }
        }
        XDP_DROP
    }

    /// Lets everything through. A veth pair loses what one end sends from XDP unless the other has a
    /// program, too.
    #[xdp]
    pub(crate) fn pass(_: XdpContext) -> u32 {
        XDP_PASS
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
