//! The programs' entry points: each binds a kernel context to the library and its answer to the
//! number that the kernel expects.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(asm_experimental_arch, core_intrinsics)
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "compare-and-exchange")
)]

#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    // For the host this crate is a library; its programs exist only for the kernel.
}
