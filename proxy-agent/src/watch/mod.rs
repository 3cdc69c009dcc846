//! Where objects come from: an API server, or a directory of manifests.
//!
//! A source sends [`Event`](crate::model::object::Event)s into a channel. It lists everything once,
//! then says what changes, and never says that something is gone because it could not look.

mod directory;
pub mod kube;
pub mod manifests;
mod status;

pub use status::Status;

/// What of a cluster an agent wants to know.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Its own node.
    pub node_name: String,
    /// Whether it connects pods, and so must know of the other nodes.
    pub has_network: bool,
}
