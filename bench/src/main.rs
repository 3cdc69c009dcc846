//! Placeholder removed when the benchmark is written.
fn main() {}
