//! The programs: one makes frames and sends them, one counts what came of them and goes no further.
//!
//! Both run at XDP at the end of a link whose other end is the measured node's, so that a frame is
//! received by the node as from a wire, and what the node sends is looked at and dropped at once.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "frames' and maps' memory")]
mod programs {
    use aya_ebpf::{
        bindings::{
            TC_ACT_OK,
            xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
        },
        helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
        macros::{classifier, map, xdp},
        maps::{Array, PerCpuArray},
        programs::{TcContext, XdpContext},
    };
    use penstock_bench_ebpf::{
        Expected, Layout, MARK, NOTED, Plan, SAMPLES, TCP, WORDS, Window, at, count,
    };

    /// Words of an IPv4 frame.
    const WORDS_V4: usize = Layout::V4.length / 8;

    #[map]
    static PLAN: Array<Plan> = Array::with_max_entries(1, 0);
    #[map]
    static EXPECTED: Array<Expected> = Array::with_max_entries(1, 0);
    #[map]
    static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::ALL, 0);
    /// A frame that came out as it should, as it lies in memory.
    #[map]
    static SAMPLE: Array<[u64; WORDS]> = Array::with_max_entries(SAMPLES, 0);
    #[map]
    static WINDOW: Array<Window> = Array::with_max_entries(1, 0);

    /// Where the frame begins, if it is as long as all of its family.
    #[inline(always)]
    fn frame(context: &XdpContext, length: usize) -> Option<usize> {
        let start = context.data();
        (start + length <= context.data_end()).then_some(start)
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

    /// What [`look`] looks at, one element a flow.
    #[map]
    static RECORDS: Array<[u64; 16]> = Array::with_max_entries(1, 0);

    /// Looks at one element of an array, which one is said by a frame's destination address; does nothing else.
    #[xdp]
    pub(crate) fn look(context: XdpContext) -> u32 {
        let Some(start) = frame(&context, 6) else {
            return XDP_ABORTED;
        };
        // SAFETY: inside the frame, by the comparison in `frame`; any octets will do, read unaligned.
        let index = unsafe { ((start + 2) as *const u32).read_unaligned() };
        let Some(record) = RECORDS.get_ptr(index) else {
            return XDP_ABORTED;
        };
        // SAFETY: a mapped element, any octets of which will do.
        match unsafe { record.cast::<u64>().read_volatile() } {
            0 => XDP_PASS,
            _ => XDP_DROP,
        }
    }

    /// Makes the next frame of IPv4 and sends it.
    #[xdp]
    pub(crate) fn generate(context: XdpContext) -> u32 {
        next::<false>(&context)
    }

    /// The same of IPv6.
    #[xdp]
    pub(crate) fn generate6(context: XdpContext) -> u32 {
        next::<true>(&context)
    }

    /// Makes a frame and sends it. What is in the frame before may be any earlier one's rest, since the kernel
    /// uses pages again.
    #[inline(always)]
    fn next<const IS_V6: bool>(context: &XdpContext) -> u32 {
        let layout = Layout::of(IS_V6);
        let (Some(start), Some(plan)) = (frame(context, layout.length), PLAN.get_ptr(0)) else {
            return XDP_ABORTED;
        };
        // SAFETY: user space wrote it before the first run and does not again.
        let plan = unsafe { &*plan };
        let number = one_more(count::SENT) as u32;
        let new = plan.variation(number);
        // SAFETY: all of it is inside the frame, by the comparison in `frame`; fields lie anywhere. IPv4's
        // words are the first of the plan's.
        unsafe {
            if IS_V6 {
                (start as *mut [u64; WORDS]).write_unaligned(plan.frame);
            } else {
                let words = plan.frame.as_ptr().cast::<[u64; WORDS_V4]>();
                (start as *mut [u64; WORDS_V4]).write_unaligned(*words);
                ((start + at::HEADER_CHECKSUM) as *mut [u8; 2])
                    .write_unaligned(new.header_checksum);
            }
            ((start + layout.destination - 2) as *mut [u8; 2]).write_unaligned(new.host);
            ((start + layout.source_port) as *mut [u8; 2]).write_unaligned(new.port);
            let checksum = if plan.protocol == u32::from(TCP) {
                layout.tcp_checksum()
            } else {
                layout.udp_checksum()
            };
            ((start + checksum) as *mut [u8; 2]).write_unaligned(new.transport_checksum);
        }
        // SAFETY: the helper takes plain numbers.
        unsafe { bpf_redirect(plan.interface, 0) as u32 }
    }

    /// Counts and drops what the node sent of IPv4's; lets everything else through.
    #[xdp]
    pub(crate) fn swallow(context: XdpContext) -> u32 {
        take::<false>(&context)
    }

    /// The same of IPv6's.
    #[xdp]
    pub(crate) fn swallow6(context: XdpContext) -> u32 {
        take::<true>(&context)
    }

    /// An address in a frame.
    ///
    /// # Safety
    ///
    /// It has to be inside the frame.
    #[inline(always)]
    unsafe fn address<const IS_V6: bool>(at: usize) -> [[u8; 4]; 4] {
        // SAFETY: the caller's; any octets will do, read unaligned.
        unsafe {
            if IS_V6 {
                (at as *const [[u8; 4]; 4]).read_unaligned()
            } else {
                let first = (at as *const [u8; 4]).read_unaligned();
                [first, [0; 4], [0; 4], [0; 4]]
            }
        }
    }

    #[inline(always)]
    fn take<const IS_V6: bool>(context: &XdpContext) -> u32 {
        let layout = Layout::of(IS_V6);
        let Some(start) = frame(context, layout.length) else {
            return XDP_PASS;
        };
        // SAFETY: inside the frame, by the comparison in `frame`; any bytes will do, read unaligned.
        let (mark, found) = unsafe {
            (
                ((start + layout.mark) as *const u64).read_unaligned(),
                Expected {
                    source: address::<IS_V6>(start + layout.source),
                    mask: [[0xff; 4]; 4],
                    destination: address::<IS_V6>(start + layout.destination),
                    port: ((start + layout.destination_port()) as *const [u8; 2]).read_unaligned(),
                    protocol: ((start + layout.protocol) as *const u8).read_unaligned(),
                    ttl: ((start + layout.ttl) as *const u8).read_unaligned(),
                },
            )
        };
        if mark != u64::from_ne_bytes(MARK) {
            return XDP_PASS;
        }
        let words = layout.address_words();
        // SAFETY: user space wrote it before the first frame and does not again.
        let is_right = EXPECTED
            .get_ptr(0)
            .is_some_and(|expected| unsafe { (*expected).is_met_by(&found, words) });
        if !is_right {
            one_more(count::WRONG);
            return XDP_DROP;
        }
        let before = one_more(count::FORWARDED);
        let place = (before / NOTED) as u32 % SAMPLES;
        if before.is_multiple_of(NOTED)
            && let (Some(sample), Some(window)) = (SAMPLE.get_ptr_mut(place), WINDOW.get_ptr_mut(0))
        {
            // SAFETY: the frame is as long as that; elements are this program's, which runs on one
            // processor, until user space reads them after the last frame. The helper takes nothing.
            unsafe {
                if IS_V6 {
                    *sample = (start as *const [u64; WORDS]).read_unaligned();
                } else {
                    let words = (start as *const [u64; WORDS_V4]).read_unaligned();
                    *sample.cast::<[u64; WORDS_V4]>() = words;
                }
                (*window).note(before, bpf_ktime_get_ns());
            }
        }
        XDP_DROP
    }

    /// Nothing, as a TC hook: what running any program takes.
    #[classifier]
    pub(crate) fn nothing(_: TcContext) -> i32 {
        TC_ACT_OK
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
