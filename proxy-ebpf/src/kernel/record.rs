//! [`Record`] for a flow's record where it lies in its array.
#![expect(unsafe_code, reason = "records are shared memory")]

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg},
    ptr::{addr_of, addr_of_mut},
};

use penstock_common::{Addr, BackendId, Be16, Flow, FlowKey, Proto, ServiceId};
use penstock_ebpf::env::Record;

use super::env::copy;

/// A pointer to a flow's record.
pub(crate) struct RecordPtr<A>(pub(super) *mut Flow<A>);

impl<A> Clone for RecordPtr<A> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for RecordPtr<A> {}

/// One field of a record, which as a whole would be copied to the stack, where there is no room.
macro_rules! field {
    ($record:ident, $name:ident) => {
        copy(
            // SAFETY: a field's address inside the mapped element; nothing is read.
            unsafe { addr_of!((*$record.0).$name) },
        )
    };
}

/// Does something with all of a record's fields but its state, one after the other.
macro_rules! each_field {
    ($each:ident) => {
        $each!(
            seen_secs,
            service,
            backend_id,
            backend_generation,
            client,
            frontend,
            backend,
            source,
            client_port,
            frontend_port,
            backend_port,
            source_port,
            flags,
            proto,
            fins
        );
    };
}

impl<A: Addr> Record<A> for RecordPtr<A> {
    #[inline(always)]
    fn state(self) -> u32 {
        field!(self, state)
    }

    #[inline(always)]
    fn key(self, direction: u8) -> FlowKey<A> {
        let proto = field!(self, proto);
        if direction == FlowKey::<A>::REQUEST {
            let client = (field!(self, client), field!(self, client_port));
            let frontend = (field!(self, frontend), field!(self, frontend_port));
            FlowKey::new(direction, proto, client, frontend)
        } else {
            let backend = (field!(self, backend), field!(self, backend_port));
            let source = (field!(self, source), field!(self, source_port));
            FlowKey::new(direction, proto, backend, source)
        }
    }

    #[inline(always)]
    fn flags(self) -> u16 {
        field!(self, flags)
    }

    #[inline(always)]
    fn backend(self) -> (BackendId, u32) {
        (field!(self, backend_id), field!(self, backend_generation))
    }

    #[inline(always)]
    fn service(self) -> ServiceId {
        field!(self, service)
    }

    #[inline(always)]
    fn fins(self) -> u8 {
        field!(self, fins)
    }

    #[inline(always)]
    fn set_fins(self, fins: u8) {
        // SAFETY: as below; a byte of a live record, which its two directions alone change.
        unsafe { addr_of_mut!((*self.0).fins).write_volatile(fins) };
    }

    #[inline(always)]
    fn last_seen(self) -> (Proto, u32) {
        (field!(self, proto), field!(self, seen_secs))
    }

    #[inline(always)]
    fn exchange_state(self, from: u32, to: u32) -> bool {
        // SAFETY: the pointer is to a mapped array element (see `copy`), whose first field is an
        // aligned word that everybody changes atomically.
        unsafe {
            atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                addr_of_mut!((*self.0).state),
                from,
                to,
            )
            .1
        }
    }

    #[inline(always)]
    fn set_state(self, state: u32) {
        // SAFETY: as above; an aligned word is written whole.
        unsafe { addr_of_mut!((*self.0).state).write_volatile(state) };
    }

    #[inline(always)]
    fn touch(self, now_secs: u32) {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*self.0).seen_secs).write_volatile(now_secs) };
    }

    #[inline(always)]
    fn set_source_port(self, port: Be16) {
        // SAFETY: as above; nobody else reads or writes a claimed record.
        unsafe { addr_of_mut!((*self.0).source_port).write(port) };
    }

    #[inline(always)]
    fn set_source(self, source: A, flags: u16) {
        // SAFETY: as above.
        unsafe {
            addr_of_mut!((*self.0).source).write(source);
            addr_of_mut!((*self.0).flags).write(flags);
        }
    }

    #[inline(always)]
    fn assume(self, other: Self) {
        macro_rules! copied {
            ($($name:ident),*) => {
                $(
                    let value = field!(other, $name);
                    // SAFETY: as above; the record is this program's alone, see `store`.
                    unsafe { addr_of_mut!((*self.0).$name).write(value) };
                )*
            };
        }
        each_field!(copied);
    }

    #[inline(always)]
    fn store(self, flow: &Flow<A>) {
        macro_rules! stored {
            ($($name:ident),*) => {
                let Flow { state: _, $($name),* } = *flow;
                // SAFETY: as above; the record is in state CLAIMED by this program, so that nobody
                // else writes it and whoever reads it ignores it.
                unsafe {
                    $(addr_of_mut!((*self.0).$name).write($name);)*
                }
            };
        }
        each_field!(stored);
    }
}
