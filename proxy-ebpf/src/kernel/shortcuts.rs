//! Elements of `SHORTCUTS`, which are their CPU's alone.
#![expect(unsafe_code, reason = "map elements are shared memory")]

use core::ptr::{addr_of, addr_of_mut};

use penstock_common::{Addr, Plain, Shortcut};
use penstock_ebpf::env::{Env, Way};

use super::env::copy;

/// What is noted at `place`, if it is about these packets and holds.
#[inline(always)]
pub(super) fn recall<A: Addr>(
    env: &impl Env,
    place: *const Shortcut<A>,
    ifindex: u32,
    src: &A,
    dst: &A,
) -> Option<Way> {
    // SAFETY: fields' addresses inside the mapped element; nothing is read.
    let (at_src, at_dst, at_ifindex, at_changed, at_noted, at_kind, at_to, at_route) = unsafe {
        (
            addr_of!((*place).src),
            addr_of!((*place).dst),
            addr_of!((*place).ifindex),
            addr_of!((*place).changed),
            addr_of!((*place).noted_secs),
            addr_of!((*place).kind),
            addr_of!((*place).to),
            addr_of!((*place).route),
        )
    };
    if copy(at_dst) != *dst
        || copy(at_src) != *src
        || copy(at_ifindex) != ifindex
        || copy(at_changed) != env.changed()
        || env.now_secs().wrapping_sub(copy(at_noted)) >= Shortcut::<A>::LASTS_SECS
    {
        return None;
    }
    Some(Way {
        kind: copy(at_kind),
        to: copy(at_to),
        route: copy(at_route),
    })
}

/// Notes at `place` where these packets go.
#[inline(always)]
pub(super) fn note<A: Addr>(
    env: &impl Env,
    place: *mut Shortcut<A>,
    changed: u64,
    ifindex: u32,
    src: &A,
    dst: &A,
    way: &Way,
) {
    // SAFETY: fields' addresses inside the mapped element. It is this CPU's, and programs of one hook
    // do not interrupt each other: nobody sees half of it.
    unsafe {
        write(addr_of_mut!((*place).kind), way.kind);
        write(addr_of_mut!((*place).to), way.to);
        write(addr_of_mut!((*place).route), way.route);
        write(addr_of_mut!((*place).changed), changed);
        write(addr_of_mut!((*place).noted_secs), env.now_secs());
        write(addr_of_mut!((*place).ifindex), ifindex);
        write(addr_of_mut!((*place).src), *src);
        write(addr_of_mut!((*place).dst), *dst);
    }
}

/// # Safety
///
/// `field` must be one of a mapped element.
#[inline(always)]
unsafe fn write<T: Plain>(field: *mut T, value: T) {
    // SAFETY: the caller's promise.
    unsafe { field.write_volatile(value) };
}
