//! Which types may be read from memory that somebody else writes.
#![expect(
    unsafe_code,
    reason = "declares the trait that makes reading foreign bytes sound"
)]

/// A type for which any bytes of the right length are a valid value, and which has no padding.
///
/// # Safety
///
/// The implementor holds only integers, arrays of them and other `Plain` types, is `repr(C)` or
/// `repr(transparent)`, and has no implicit padding.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! integers {
    ($($t:ty),*) => {
        $(
            // SAFETY: every bit pattern of an integer is a value and integers have no padding.
            unsafe impl Plain for $t {}
        )*
    };
}
integers!(u8, u16, u32, u64);

// SAFETY: an array has no padding besides that of its elements, which have none.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Declares map types plain, asserting each size, which is also what excludes hidden padding.
macro_rules! map_types {
    ($($t:ty = $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(core::mem::size_of::<$t>() == $size);
            // SAFETY: `repr(C)` of plain fields; the asserted size is the sum of the fields' sizes.
            #[expect(unsafe_code, reason = "the one place where map types are declared plain")]
            unsafe impl $crate::Plain for $t {}
            // SAFETY: as above: any bytes are a value, and there is no padding to leak.
            #[cfg(feature = "user")]
            #[expect(unsafe_code, reason = "the one place where map types are declared plain")]
            unsafe impl aya::Pod for $t {}
        )*
    };
}
pub(crate) use map_types;
