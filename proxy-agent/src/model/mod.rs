//! Pure: from objects to what this node should serve. No kernel, no clock, no I/O.
//!
//! [`world::World`] holds what the sources said and knows which services a change touched;
//! [`endpoints`] picks endpoints as kube-proxy does; [`port::Port`] is the result.

pub mod endpoints;
pub mod node_ports;
pub mod object;
pub mod port;
pub mod world;
