//! Many map elements in one system call (BPF_MAP_*_BATCH, Linux 5.6), which aya does not offer.
//!
//! Invariant: the number of elements that an error reports as done is exact, so that a caller
//! knows what the kernel holds.
#![expect(unsafe_code, reason = "bpf(2) takes pointers as integers")]

use std::{
    collections::HashMap,
    hash::Hash,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use penstock_common::Plain;

const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_MAP_DELETE_BATCH: libc::c_int = 27;

/// `union bpf_attr`'s `batch` member (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A batch stopped early.
#[derive(Debug)]
pub struct Stopped {
    /// How many elements were done.
    pub done: usize,
    /// Why the next one was not.
    pub source: io::Error,
}

fn call(command: libc::c_int, attributes: &mut Attributes) -> io::Result<()> {
    // SAFETY: the attributes live through the call, are as large as said, and the pointers inside
    // were made by the callers below from slices of at least `count` elements of the map's key
    // and value sizes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<Attributes>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Writes `values` under `keys`, which are equally many.
pub fn update<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), Stopped> {
    let count = keys.len().min(values.len());
    if count == 0 {
        return Ok(());
    }
    let mut attributes = Attributes {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: count as u32,
        map_fd: map.as_raw_fd() as u32,
        ..Attributes::default()
    };
    call(BPF_MAP_UPDATE_BATCH, &mut attributes).map_err(|source| Stopped {
        done: done(&source, &attributes, count),
        source,
    })
}

/// Removes `keys`; one that is absent is no error.
pub fn delete<K: Plain>(map: BorrowedFd<'_>, keys: &[K]) -> Result<(), Stopped> {
    let mut done_before = 0;
    while let Some(rest) = keys.get(done_before..).filter(|rest| !rest.is_empty()) {
        let mut attributes = Attributes {
            keys: rest.as_ptr() as u64,
            count: rest.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            ..Attributes::default()
        };
        match call(BPF_MAP_DELETE_BATCH, &mut attributes) {
            Ok(()) => return Ok(()),
            Err(source) => {
                let done = done_before + done(&source, &attributes, rest.len());
                if source.raw_os_error() != Some(libc::ENOENT) {
                    return Err(Stopped { done, source });
                }
                done_before = done + 1;
            }
        }
    }
    Ok(())
}

/// Makes a map that holds `known` hold `wanted`; how many elements that took. What is gone goes first, so
/// that a full map has room for what is new. Where it fails, `known` is what was done.
pub fn settle<K: Plain + Eq + Hash, V: Plain + PartialEq>(
    map: BorrowedFd<'_>,
    known: &mut HashMap<K, V>,
    wanted: &HashMap<K, V>,
) -> io::Result<usize> {
    let gone = known.keys().filter(|key| !wanted.contains_key(key));
    let gone: Vec<K> = gone.copied().collect();
    let deleted = delete(map, &gone);
    let done = deleted
        .as_ref()
        .map_or_else(|stopped| stopped.done, |()| gone.len());
    for key in gone.iter().take(done) {
        known.remove(key);
    }
    deleted.map_err(|stopped| stopped.source)?;
    let new = wanted
        .iter()
        .filter(|(key, value)| known.get(key) != Some(value));
    let (keys, values): (Vec<K>, Vec<V>) = new.map(|(key, value)| (*key, *value)).unzip();
    let updated = update(map, &keys, &values);
    let done = updated
        .as_ref()
        .map_or_else(|stopped| stopped.done, |()| keys.len());
    known.extend(keys.iter().copied().zip(values).take(done));
    updated.map_err(|stopped| stopped.source)?;
    Ok(gone.len() + keys.len())
}

/// How far a failed batch came. Where the kernel could not even begin it left the count alone, or
/// set it to zero.
fn done(error: &io::Error, attributes: &Attributes, count: usize) -> usize {
    let reported = attributes.count as usize;
    let never_began = matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL));
    if never_began || reported >= count {
        0
    } else {
        reported
    }
}

/// All elements of a map, in the kernel's order.
pub fn lookup_all<K: Plain + Default, V: Plain + Default>(
    map: BorrowedFd<'_>,
    chunk: usize,
) -> io::Result<Vec<(K, V)>> {
    lookup_while(map, chunk, &|_| true)
}

/// Elements of a map, in the kernel's order, until the first chunk of them of which `goes_on` says that there
/// is nothing behind it.
pub fn lookup_while<K: Plain + Default, V: Plain + Default>(
    map: BorrowedFd<'_>,
    chunk: usize,
    goes_on: &dyn Fn(&[V]) -> bool,
) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    let mut keys = vec![K::default(); chunk];
    let mut values = vec![V::default(); chunk];
    // A position is opaque: an array's index or a hash map's bucket, 4 bytes each, or a key.
    let mut position = [0_u8; 64];
    let mut is_first = true;
    loop {
        let mut attributes = Attributes {
            in_batch: if is_first {
                0
            } else {
                position.as_ptr() as u64
            },
            out_batch: position.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map_fd: map.as_raw_fd() as u32,
            ..Attributes::default()
        };
        let result = call(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let is_end = match result {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket holds more than the chunk takes: ask for more at once.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                let larger = keys.len() * 2;
                return if larger > 1 << 20 {
                    Err(error)
                } else {
                    lookup_while(map, larger, goes_on)
                };
            }
            Err(error) => return Err(error),
        };
        let count = attributes.count as usize;
        found.extend(keys.iter().copied().zip(values.iter().copied()).take(count));
        if is_end || !goes_on(values.get(..count).unwrap_or_default()) {
            return Ok(found);
        }
        is_first = false;
    }
}
