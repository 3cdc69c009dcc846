//! Nodes, pods and clients as network namespaces, for tests, demo and benchmarks.

mod requirement;

pub use requirement::require_kernel;
