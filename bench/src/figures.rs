//! Numbers from samples, and the machine that they are from.

use std::fs;

/// The value below which `percent` of the samples lie.
pub fn percentile(samples: &[u64], percent: usize) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

/// A median and an interval that holds the true one at 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Median {
    /// The samples' median.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
}

impl Median {
    /// Of some ratios: the interval is between order statistics, so it supposes nothing of how they
    /// are distributed (the sign test turned around; David and Nagaraja, Order Statistics, 7.1).
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let count = sorted.len();
        let outside = rank(count);
        Self {
            value: (at(count / 2) + at(count.saturating_sub(1) / 2)) / 2.0,
            low: at(outside),
            high: at(count.saturating_sub(1 + outside)),
        }
    }

    /// In words; a ratio is only named where its interval leaves 1 out.
    pub fn shown(self) -> String {
        let Self { value, low, high } = self;
        if low <= 1.0 && 1.0 <= high {
            format!("no difference (95 % interval {low:.3} to {high:.3})")
        } else {
            format!("{value:.3} (95 % interval {low:.3} to {high:.3})")
        }
    }
}

/// How many samples at each end lie outside a 95 % interval of the median.
fn rank(count: usize) -> usize {
    let mut probability = 0.5_f64.powi(count as i32);
    let mut cumulated = probability;
    let mut outside = 0;
    while cumulated <= 0.025 && outside * 2 < count {
        outside += 1;
        probability *= (count + 1 - outside) as f64 / outside as f64;
        cumulated += probability;
    }
    // The interval begins with the last sample whose tail is small enough.
    outside.saturating_sub(1)
}

/// Kernel and processor.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models = processors
        .lines()
        .filter_map(|line| line.strip_prefix("model name"));
    let models: Vec<&str> = models
        .map(|rest| rest.trim_start_matches(['\t', ':', ' ']))
        .collect();
    format!(
        "Linux {} on {} x {}",
        kernel.trim(),
        models.len(),
        models.first().copied().unwrap_or("an unknown processor")
    )
}

/// A line of a process's /proc status in MiB.
pub fn memory(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1_024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        // Ranks from the binomial distribution: 15 samples, 4th and 12th; 9 samples, 2nd and 8th.
        assert_eq!(rank(15), 3);
        assert_eq!(rank(9), 1);
        assert_eq!(rank(5), 0);
        let samples: Vec<f64> = (1..=15).map(f64::from).collect();
        let median = Median::of(&samples);
        assert_eq!((median.value, median.low, median.high), (8.0, 4.0, 12.0));
    }

    #[test]
    fn a_ratio_within_its_noise_is_not_named() {
        assert!(
            Median::of(&[0.9, 1.0, 1.1])
                .shown()
                .starts_with("no difference")
        );
        assert!(Median::of(&[1.2, 1.3, 1.4]).shown().starts_with("1.3"));
    }
}
