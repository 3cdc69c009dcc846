//! The impure half: maps, helpers, contexts. The only place where this crate is unsafe.

pub(crate) mod env;
pub(crate) mod maps;
pub(crate) mod record;
pub(crate) mod routes;
mod shortcuts;
pub(crate) mod skb;
pub(crate) mod sock;
mod unaligned;
pub(crate) mod xdp;
