//! Builds the kernel programs and hands them to the crate as `$OUT_DIR/penstock-ebpf`.
//!
//! `PENSTOCK_EBPF_OBJECT` names a ready-made object instead.

use std::path::Path;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let inputs = ["proxy-ebpf", "proxy-common"];
    let built = penstock_ebpf_build::build(&root, "penstock-ebpf", &inputs, "PENSTOCK_EBPF_OBJECT");
    if let Err(problem) = built {
        println!("cargo::error=the kernel programs can't be built: {problem}");
        std::process::exit(1);
    }
}
