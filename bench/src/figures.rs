//! Numbers from samples.

use serde::{Deserialize, Serialize};

/// Fewer samples than this have no 95 % interval: even their extremes miss the true median more
/// often (twice 0.5 to the fifth is 0.0625).
pub const LEAST: usize = 6;

/// The value below which `percent` of the samples lie.
pub fn percentile(samples: &[u64], percent: usize) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    permille(&sorted, percent * 10)
}

/// The value below which so many of a thousand samples lie; they have to be sorted.
pub fn permille(sorted: &[u64], permille: usize) -> u64 {
    let index = (sorted.len() * permille / 1_000).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

/// A median and an interval that holds the true one at 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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

    /// Whether a ratio is another than 1: its interval leaves 1 out.
    pub fn is_difference(self) -> bool {
        // A ratio to nothing, or of nothing, is none.
        self.low > 0.0 && (self.high < 1.0 || 1.0 < self.low)
    }

    /// Whether it says how large the difference is: its interval is no wider than the way from 1 to the
    /// median. Both are measured as ratios, so that twice and half are equally far from 1.
    pub fn is_sized(self) -> bool {
        self.is_difference() && (self.high / self.low).ln() <= self.value.ln().abs()
    }

    /// In words; a ratio is only named where it says something.
    pub fn shown(self) -> String {
        let Self { value, low, high } = self;
        if !self.is_difference() {
            format!("no difference (95 % interval {low:.3} to {high:.3})")
        } else if !self.is_sized() {
            format!("not 1, but not known better (95 % interval {low:.3} to {high:.3})")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_tables() {
        // Ranks from the binomial distribution: 15 samples, 4th and 12th; 9 samples, 2nd and 8th.
        assert_eq!(rank(15), 3);
        assert_eq!(rank(9), 1);
        assert_eq!(rank(LEAST), 0);
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
        // Beside 1, but nobody knows where.
        for samples in [[1.01, 1.1, 3.0], [0.02, 0.7, 0.99]] {
            let ratio = Median::of(&samples);
            assert!(ratio.is_difference() && !ratio.is_sized());
            assert!(ratio.shown().starts_with("not 1"), "{}", ratio.shown());
        }
        assert!(Median::of(&[0.25, 0.3, 0.4]).is_sized());
        assert!(!Median::of(&[0.0, 0.0, 0.0]).is_difference());
    }
}
