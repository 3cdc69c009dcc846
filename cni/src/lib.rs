//! Penstock's CNI plugin as a library, and what the plugin and the node's agent say to each other.
//!
//! The plugin owns addresses and interfaces, and remembers them in [`state`]; the agent owns the
//! kernel's maps and programs, says what the node's network is in [`network`], and puts what
//! [`state`] says into the maps, at [`agent`]'s request at once.
//!
//! ```text
//! stdin, environment -> request -> command -> ledger (addresses), in store (on disk)
//!                                          -> link (interface), by netlink, in netns
//!                                          -> agent (maps)
//!                                          -> result -> stdout
//! ```
//!
//! A network's configuration, of which only the first three fields have to be there:
//!
//! ```json
//! {
//!   "cniVersion": "1.1.0",
//!   "name": "pods",
//!   "type": "penstock-cni",
//!   "capabilities": {"portMappings": true, "bandwidth": true, "ips": true},
//!   "mtu": 1400,
//!   "runDir": "/run/penstock",
//!   "stateDir": "/var/lib/penstock/cni"
//! }
//! ```
//!
//! Other plugins may come before it, with interfaces of their own, and after it: `tuning`, `bandwidth` and
//! `portmap`, of which it has the capabilities itself. The agent sees what they do to a pod's link, and leaves
//! packets to the host's stack where they rely on that.
#![forbid(unsafe_code)]

pub mod agent;
pub mod arguments;
pub mod capability;
pub mod command;
pub mod config;
pub mod error;
pub mod ledger;
pub mod link;
pub mod names;
pub mod netlink;
pub mod netns;
pub mod network;
pub mod plugin;
pub mod pool;
pub mod previous;
pub mod request;
pub mod result;
pub mod shape;
pub mod state;
pub mod store;
pub mod version;
