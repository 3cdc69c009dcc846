//! Words of packets, which lie wherever their headers left them.
//!
//! LLVM takes an unaligned word for as many bytes, each with a load, a shift and an or, since not
//! every machine has more to offer. Those that Penstock runs on do (and Linux lets programs know only
//! what theirs does: `CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`), and both the kernel's check of the
//! programs and the packets are the faster for it: hence words by hand.
#![expect(unsafe_code, reason = "packet memory")]

use core::{
    arch::asm,
    mem::{MaybeUninit, align_of},
};

use penstock_common::Plain;

/// Reads a value.
///
/// # Safety
///
/// The verifier must know the value's bytes at this address to be readable.
#[inline(always)]
pub(super) unsafe fn read<T: Plain>(from: usize) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    let to = value.as_mut_ptr();
    let mut at = 0;
    while at < size_of::<T>() {
        // SAFETY: both are inside a `T`, by the caller's promise and by `at`; what is written is as
        // aligned as a `T`.
        unsafe {
            match align_of::<T>() {
                8 => to.byte_add(at).cast::<u64>().write(read_u64(from + at)),
                4 => to.byte_add(at).cast::<u32>().write(read_u32(from + at)),
                2 => to.byte_add(at).cast::<u16>().write(read_u16(from + at)),
                _ => to
                    .byte_add(at)
                    .cast::<u8>()
                    .write((from as *const u8).add(at).read()),
            }
        }
        at += align_of::<T>();
    }
    // SAFETY: each of its bytes was written, and any bytes are a `T`.
    unsafe { value.assume_init() }
}

/// Writes a value.
///
/// # Safety
///
/// The verifier must know as many bytes at this address to be writable.
#[inline(always)]
pub(super) unsafe fn write<T: Plain>(to: usize, value: &T) {
    let from = core::ptr::from_ref(value);
    let mut at = 0;
    while at < size_of::<T>() {
        // SAFETY: as in `read`, the other way round.
        unsafe {
            match align_of::<T>() {
                8 => write_u64(to + at, from.byte_add(at).cast::<u64>().read()),
                4 => write_u32(to + at, from.byte_add(at).cast::<u32>().read()),
                2 => write_u16(to + at, from.byte_add(at).cast::<u16>().read()),
                _ => (to as *mut u8)
                    .add(at)
                    .write(from.byte_add(at).cast::<u8>().read()),
            }
        }
        at += align_of::<T>();
    }
}

/// Reading and writing one kind of word.
macro_rules! word {
    ($read:ident, $write:ident, $word:ty, $load:literal, $store:literal) => {
        #[inline(always)]
        unsafe fn $read(from: usize) -> $word {
            let value: u64;
            // SAFETY: the caller's promise; the instruction fills a register.
            unsafe {
                asm!($load, value = out(reg) value, at = in(reg) from,
                    options(pure, readonly, nostack, preserves_flags));
            }
            value as $word
        }

        #[inline(always)]
        unsafe fn $write(to: usize, value: $word) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!($store, value = in(reg) u64::from(value), at = in(reg) to,
                    options(nostack, preserves_flags));
            }
        }
    };
}
word!(
    read_u16,
    write_u16,
    u16,
    "{value} = *(u16 *)({at} + 0)",
    "*(u16 *)({at} + 0) = {value}"
);
word!(
    read_u32,
    write_u32,
    u32,
    "{value} = *(u32 *)({at} + 0)",
    "*(u32 *)({at} + 0) = {value}"
);
word!(
    read_u64,
    write_u64,
    u64,
    "{value} = *(u64 *)({at} + 0)",
    "*(u64 *)({at} + 0) = {value}"
);
