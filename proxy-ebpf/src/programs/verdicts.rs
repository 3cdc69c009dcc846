//! What the functions of a hook tell each other: a stage's [`penstock_ebpf::pod::Verdict`] as a number.
//!
//! None is a verdict of the kernel's; those are at least 0 and below [`DROPPED`].

use penstock_common::limits;

/// Leaves the packet to whoever is next at the hook, and else to the kernel.
pub(super) const NEXT: i32 = -1;
pub(super) const HELD_OUTSIDE: i32 = -28;
pub(super) const LOOK: i32 = -27;
pub(super) const WRAPPED: i32 = -26;
pub(super) const TOO_LONG_AS_IT_CAME: i32 = -25;
pub(super) const HAND_OVER: i32 = -24;
pub(super) const SPLIT: i32 = -23;
pub(super) const REJOIN: i32 = -22;
pub(super) const HANDED: i32 = -21;
pub(super) const HAND_BACK: i32 = -20;
pub(super) const CAME_BACK: i32 = -19;
pub(super) const NO_RECORD: i32 = -18;
pub(super) const OPENING: i32 = -17;
pub(super) const PLACED: i32 = -16;
pub(super) const TAKE_OVER: i32 = -15;
pub(super) const TOO_LONG: i32 = -14;
pub(super) const UNTOUCHED: i32 = -13;
pub(super) const ARRIVED: i32 = -12;
pub(super) const OUTSIDE: i32 = -11;
pub(super) const LEAVE: i32 = -10;
pub(super) const LOCAL: i32 = -9;
pub(super) const FORWARD: i32 = -8;
pub(super) const REQUEST: i32 = -7;
pub(super) const ICMP: i32 = -6;
pub(super) const NODE: i32 = -5;
pub(super) const OPEN: i32 = -4;
pub(super) const OPENED: i32 = -3;
// Plus the `Counter` that says why.
pub(super) const DROPPED: i32 = 1_000;
pub(super) const REFUSED: i32 = 2_000;
// Plus the `FlowId`.
pub(super) const CLAIMED: i32 = 1 << 20;
// Plus the chunk.
pub(super) const SEARCH: i32 = 1 << 20;
// Plus twice the `FlowId`, and one for a reply.
pub(super) const FOUND: i32 = 1 << 28;
pub(super) const SOUGHT: i32 = 1 << 29;
const _: () = assert!(2 * (limits::MOST_FLOWS as i32) <= SOUGHT - FOUND);
/// In place of such a number.
pub(super) const NOT_FOUND: u32 = u32::MAX;
