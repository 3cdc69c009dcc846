//! What Penstock does in the kernel, apart from the kernel.
//!
//! This library knows neither maps nor helpers: it reaches them through the traits in [`env`] and
//! [`packet`], which `main.rs` and `kernel/` implement. Every function is generic over the address
//! family and inlined into one flat program each.
//!
//! ```text
//! packet from or to a pod                        connect(2), sendmsg(2) of a pod or host process
//!      │ parse: headers, ports, fragments              │
//!      ▼                                               ▼
//! request / reply: known flow? ──no──► select ◄──── socket
//!      │ yes                    frontend → slot → backend, affinity
//!      ▼                              │ none: reject, drop
//! rewrite: addresses, ports, checksums, quoted packets
//! ```
//!
//! Invariant: a packet whose destination is no service address costs one look-up and is passed on
//! untouched, whatever it holds.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod checksum;
pub mod dialled;
pub mod env;
pub mod external;
pub mod family;
pub mod flow;
pub mod forward;
pub mod handover;
pub mod packet;
pub mod parse;
pub mod pod;
pub mod quoted;
pub mod reject;
pub mod rewrite;
pub mod sctp;
pub mod select;
pub mod socket;
pub mod tunnel;
pub mod xdp;
