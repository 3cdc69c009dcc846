//! Builds the kernel programs and hands them to the crate as `$OUT_DIR/penstock-ebpf`.
//!
//! `PENSTOCK_EBPF_OBJECT` names a ready-made object instead.

fn main() {
    let inputs = ["proxy-ebpf", "proxy-common"];
    let built = penstock_ebpf_build::build("penstock-ebpf", &inputs, "PENSTOCK_EBPF_OBJECT");
    if let Err(problem) = built {
        println!("cargo::error=the kernel programs can't be built: {problem}");
        std::process::exit(1);
    }
}
