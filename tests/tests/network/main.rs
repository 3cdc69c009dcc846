//! The pod network end to end: agents with `--network`, pods made by the real plugin.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod capabilities;
mod chained;
mod changes;
mod check;
mod churn;
mod host_ports;
mod install;
mod many;
mod native;
mod net;
mod outside;
mod reach;
mod remains;
mod size;
mod traces;
mod undisturbed;
