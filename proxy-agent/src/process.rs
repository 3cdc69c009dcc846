//! What the agent's process uses, under the names that all clients of Prometheus have for it.

use std::{
    fs,
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// Ticks a second in /proc, whatever the kernel's own clock does (USER_HZ of all architectures that Rust has).
const TICKS: f64 = 100.0;

/// What a process uses, and since when it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Process {
    processor_seconds: f64,
    resident_bytes: i64,
    virtual_bytes: i64,
    started_seconds: f64,
    open_files: i64,
}

impl Process {
    /// This process, as far as /proc tells.
    pub(crate) fn look() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let booted = now.saturating_sub(Duration::try_from_secs_f64(uptime).ok()?);
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let files = fs::read_dir("/proc/self/fd").ok()?.count();
        Self::read(&stat, &status, booted, i64::try_from(files).ok()?)
    }

    /// From /proc/PID/stat (proc_pid_stat(5)) and /proc/PID/status.
    fn read(stat: &str, status: &str, booted: Duration, open_files: i64) -> Option<Self> {
        // The second field is the program's name in parentheses, and may have any of these itself.
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let seconds = |number: usize| -> Option<f64> {
            let ticks: f64 = fields.get(number - 3)?.parse().ok()?;
            Some(ticks / TICKS)
        };
        let bytes = |name: &str| -> Option<i64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kibibytes: i64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            kibibytes.checked_mul(1_024)
        };
        Some(Self {
            processor_seconds: seconds(14)? + seconds(15)?,
            started_seconds: booted.as_secs_f64() + seconds(22)?,
            virtual_bytes: bytes("VmSize:")?,
            resident_bytes: bytes("VmRSS:")?,
            open_files,
        })
    }

    /// Puts it among metrics.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let processor = Counter::<f64, AtomicU64>::default();
        processor.inc_by(self.processor_seconds);
        registry.register(
            "process_cpu_seconds",
            "Processor time of the agent and of the kernel for it",
            processor,
        );
        let started = Gauge::<f64, AtomicU64>::default();
        started.set(self.started_seconds);
        registry.register(
            "process_start_time_seconds",
            "When the agent was started",
            started,
        );
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "The agent's resident memory",
                self.resident_bytes,
            ),
            (
                "process_virtual_memory_bytes",
                "The agent's virtual memory",
                self.virtual_bytes,
            ),
            (
                "process_open_fds",
                "The agent's open files",
                self.open_files,
            ),
        ] {
            let gauge = Gauge::<i64>::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_it_is_called() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 9 0 300 1";
        let status = "Name:\ta ) b\nVmSize:\t    1024 kB\nVmRSS:\t     100 kB\n";
        let booted = Duration::from_secs(1_000);
        let process = Process::read(stat, status, booted, 12);
        let expected = Process {
            processor_seconds: 2.0,
            resident_bytes: 102_400,
            virtual_bytes: 1_048_576,
            started_seconds: 1_003.0,
            open_files: 12,
        };
        assert_eq!(process, Some(expected));
        assert!(Process::look().is_some_and(|own| own.resident_bytes > 0));
    }
}
