//! Penstock's CNI plugin as a library, and what the plugin and the node's agent say to each other.
//!
//! The plugin owns addresses and interfaces, and remembers them in [`state`]; the agent owns the
//! kernel's maps and programs, says what the node's network is in [`network`], and puts what
//! [`state`] says into the maps, at [`agent`]'s request at once.

pub mod agent;
pub mod error;
pub mod network;
pub mod pool;
pub mod state;
