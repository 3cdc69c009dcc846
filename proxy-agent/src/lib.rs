//! The agent: `API objects → desired state → map entries → kernel`, in this order and no other.
//!
//! Each module stands at one place on that line and imports only from its left neighbour's types:
//! `watch` and `api` read objects, `model` (pure) decides what this node should serve, `plan`
//! (pure) turns that into ordered map writes, `dataplane` makes them. Beside that line `network`
//! connects pods: routes, the overlay, and what the CNI plugin needs.

pub mod agent;
pub mod api;
pub mod attach;
pub mod cli;
pub mod dataplane;
pub mod flows;
pub mod health;
pub mod ipc;
pub mod listen;
pub mod loads;
pub mod metrics;
pub mod model;
pub mod monitor;
pub mod network;
pub mod plan;
pub mod ports;
mod process;
pub mod reconcile;
pub mod report;
pub mod signals;
pub mod stats;
pub mod traces;
pub mod udp;
pub mod usage;
pub mod watch;
pub mod words;
