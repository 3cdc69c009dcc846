//! The CNI plugin's program: everything is in the library.

fn main() -> std::process::ExitCode {
    penstock_cni::plugin::main()
}
