//! Maps that the kernel lets nobody write any more, but programs.
#![expect(unsafe_code, reason = "no library here has BPF_MAP_FREEZE")]

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
};

use anyhow::{Result, ensure};

/// Has the kernel refuse all later writes of processes to a map (`EPERM`), for as long as it is there.
pub fn freeze(map: BorrowedFd<'_>) -> Result<()> {
    /// uapi/linux/bpf.h
    const BPF_MAP_FREEZE: libc::c_int = 22;
    /// What the call takes of `union bpf_attr`.
    #[repr(C)]
    struct Attributes {
        map_fd: u32,
    }
    let attributes = Attributes {
        map_fd: u32::try_from(map.as_raw_fd())?,
    };
    // SAFETY: the kernel reads as many bytes as it is told, which live until it returns, and writes none.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_FREEZE,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    ensure!(
        result == 0,
        "freezing a map: {}",
        io::Error::last_os_error()
    );
    Ok(())
}
