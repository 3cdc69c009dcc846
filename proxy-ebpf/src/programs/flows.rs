//! The stages that make a flow, for TC and XDP alike, and what their loops do at each turn.

use aya_ebpf::{Global, programs::TcContext};
use penstock_common::{FlowId, V4, V6};
use penstock_ebpf::{flow, pod::Verdict};

use super::{dropped, verdicts::*};
use crate::kernel::env::Kernel;

/// The stages for one family.
macro_rules! family {
    ($family:ty: $claim:ident, $place:ident, $search:ident, $take_over:ident, $enter:ident, $begin:ident) => {
        family!(step $claim(), flow::claim, $family);
        family!(step $place(id => FlowId(id)), flow::place, $family);
        family!(step $search(id => FlowId(id), from => from), flow::search, $family);
        family!(step $take_over(id => FlowId(id)), flow::take_over, $family);
        family!(step $enter(id => FlowId(id)), flow::enter, $family);

        /// Makes the flow that was decided on: a record, a source, both keys.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $begin() -> i32 {
            let mut verdict = NO_RECORD;
            let mut turns = 0;
            while verdict == NO_RECORD && turns < MOST_CLAIMS.load() {
                verdict = $claim();
                turns += 1;
            }
            if verdict < CLAIMED {
                return verdict;
            }
            let id = (verdict - CLAIMED) as u32;
            verdict = $place(id);
            turns = 0;
            while verdict >= SEARCH && turns < MOST_CHUNKS.load() {
                verdict = $search(id, (verdict - SEARCH) as u32);
                turns += 1;
            }
            if verdict == TAKE_OVER {
                verdict = $take_over(id);
            }
            if verdict == PLACED {
                verdict = $enter(id);
            }
            verdict
        }
    };
    (step $name:ident($($argument:ident => $value:expr),*), flow::$path:ident, $family:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $name($($argument: u32),*) -> i32 {
            // None of these asks about the packet.
            let context = TcContext::new(core::ptr::null_mut());
            let kernel = Kernel { context: &context };
            match flow::$path::<$family, _>(&kernel $(, $value)*) {
                Ok(Verdict::NoRecord) => NO_RECORD,
                Ok(Verdict::Claimed(id)) => CLAIMED + id.0 as i32,
                Ok(Verdict::Search(from)) => SEARCH + from as i32,
                Ok(Verdict::TakeOver) => TAKE_OVER,
                Ok(Verdict::Placed) => PLACED,
                Ok(_) => OPENED,
                Err(reason) => dropped(&context, reason),
            }
        }
    };
}
family!(V4: claim4, place4, search4, take_over4, enter4, begin4);
family!(V6: claim6, place6, search6, take_over6, enter6, begin6);

/// What is done again and again in a flow's steps, for one family: the kernel checks it once, and not
/// at each turn.
macro_rules! turns {
    ($family:ty: $evict:ident, $take_port:ident, $evict_port:ident, $succeed:ident) => {
        turns!($evict(id), flow::evict, $family);
        turns!($take_port(id, port), flow::take_port, $family);
        turns!($evict_port(id, port), flow::evict_port, $family);
        turns!($succeed(id, port), flow::succession::succeed, $family);
    };
    ($name:ident(id $(, $port:ident)?), $path:path, $family:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $name(id: u32 $(, $port: u32)?) -> u32 {
            let context = TcContext::new(core::ptr::null_mut());
            let kernel = Kernel { context: &context };
            use $path as turn;
            turn::<$family, _>(&kernel, FlowId(id) $(, $port as u16)?).into()
        }
    };
}
turns!(V4: evict4, take_port4, evict_port4, succeed4);
turns!(V6: evict6, take_port6, evict_port6, succeed6);

/// How often a record is looked for. For the verifier to count, as below.
#[unsafe(no_mangle)]
static MOST_CLAIMS: Global<u32> = Global::new(16);
/// More than a range of ports has chunks.
#[unsafe(no_mangle)]
static MOST_CHUNKS: Global<u32> = Global::new(512);
