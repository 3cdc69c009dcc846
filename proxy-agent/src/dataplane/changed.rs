//! Tells the programs that something changed which they spare themselves by what they remember.
//!
//! Invariant: whoever writes to `ADDRESSES`, `ENDPOINTS`, `ROUTES`, `UPLINKS`, `XDP_UPLINKS` or `CONFIG` says so
//! afterwards, whether all of it was written or not; and who hears that the kernel's routes or neighbours
//! are others says that.

use std::os::fd::AsFd;

use aya::maps::MapData;

use super::{
    batch,
    pins::{PinError, Pins},
};

/// The map's name.
const NAME: &str = "CHANGED";

/// `CHANGED`.
pub struct Changed(MapData);

impl Changed {
    /// The pinned map.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        pins.map(NAME).map(Self)
    }

    /// Says that a table was written: no shortcut of before holds any more.
    ///
    /// Where this fails, they hold for two seconds at most all the same.
    pub fn note(&self) {
        // No two calls meet the same nanosecond, whoever else writes.
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let nanos = now.map_or(0, |now| {
            now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
        });
        if let Err(stopped) = batch::update(self.0.fd().as_fd(), &[0_u32], &[nanos]) {
            tracing::warn!("writing map {NAME}: {}", stopped.source);
        }
    }
}
