//! A dataplane that fails on demand: the next write, every so many writes, or all for a while.

use std::io;

use super::{ApplyError, Change, Dataplane, MapError, MapState, memory::Memory};

/// Fails some writes to the maps in memory, and looks at the state after each that it makes.
#[derive(Debug, Default)]
pub struct Faulty {
    /// What works.
    pub inner: Memory,
    /// How many writes to let through before one fails; `None` lets all through.
    pub fails_after: Option<usize>,
    /// How many writes fail then.
    pub failures: usize,
    /// What was wrong after some write.
    pub problems: Vec<String>,
}

impl Dataplane for Faulty {
    fn observe(&mut self) -> Result<MapState, MapError> {
        self.inner.observe()
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), ApplyError> {
        for (applied, change) in changes.iter().enumerate() {
            match &mut self.fails_after {
                Some(0) if self.failures > 0 => {
                    self.failures -= 1;
                    if self.failures == 0 {
                        self.fails_after = None;
                    }
                    let source = MapError {
                        map: "FAULTY",
                        operation: "writing",
                        source: io::Error::from_raw_os_error(libc::ENOMEM),
                    };
                    return Err(ApplyError { applied, source });
                }
                Some(left) => *left = left.saturating_sub(1),
                None => {}
            }
            self.inner
                .write(change)
                .map_err(|source| ApplyError { applied, source })?;
            self.problems.extend(self.inner.observed().problems());
        }
        Ok(())
    }
}
