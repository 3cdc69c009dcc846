//! Builds the programs that send and count packets, and hands them to the crate as
//! `$OUT_DIR/penstock-bench-ebpf`.
//!
//! `PENSTOCK_BENCH_EBPF_OBJECT` names a ready-made object instead.

fn main() {
    let inputs = ["bench/ebpf"];
    let built =
        penstock_ebpf_build::build("penstock-bench-ebpf", &inputs, "PENSTOCK_BENCH_EBPF_OBJECT");
    if let Err(problem) = built {
        println!("cargo::error=the kernel programs can't be built: {problem}");
        std::process::exit(1);
    }
}
