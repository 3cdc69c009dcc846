//! Services as clients outside of the cluster reach them: node ports, load balancers' and external
//! addresses, by the packet hooks on a node's interfaces to the outside.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod affinity;
mod counted;
mod crowd;
mod flood;
mod forwarding;
mod health;
mod inside;
mod joined;
mod last_hop;
mod live;
mod moves;
mod narrow;
mod outside;
mod parts;
mod sctp;
mod stage;
mod tagged;
mod xdp;
