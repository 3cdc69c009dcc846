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

    /// With its interval. One that is open at its upper end says so.
    pub fn within(self, digits: usize) -> String {
        let Self { value, low, high } = self;
        if high.is_finite() {
            format!("{value:.digits$} ({low:.digits$} to {high:.digits$})")
        } else {
            format!("{value:.digits$} ({low:.digits$} or more)")
        }
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

/// How often a side of the interval of a 99th percentile misses it, and one of that of the median that it is divided
/// by: together as often as a side of a 95 % interval.
const MISSED: (f64, f64) = (0.024, 0.001);

/// How many times the median one of a hundred samples takes, at least. The interval is from the lower end of the
/// percentile's own to the upper end of the median's, and the other way around. Too few samples (less than 372) say
/// nothing of how long one of a hundred may take: then it has no upper end.
pub fn tail(samples: &[u64]) -> Median {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let at = |index: Option<usize>| {
        let value = index.and_then(|index| sorted.get(index));
        value.map_or(f64::INFINITY, |value| *value as f64)
    };
    let [(low50, high50), (low99, high99)] =
        [(0.5, MISSED.1), (0.99, MISSED.0)].map(|(part, missed)| {
            let (low, high) = ranks(sorted.len(), part, missed);
            (low.map_or(0.0, |rank| at(Some(rank))), at(high))
        });
    let value = permille(&sorted, 990) as f64 / permille(&sorted, 500) as f64;
    Median {
        value,
        low: (low99 / high50).max(1.0),
        high: if low50 > 0.0 {
            high99 / low50
        } else {
            f64::INFINITY
        },
    }
}

/// Which of so many sorted samples lie below and above the value that `part` of all lie below; on either side it is
/// otherwise with this probability at most. Nothing where even the extremes may be (the binomial distribution; David
/// and Nagaraja, Order Statistics, 7.1).
fn ranks(count: usize, part: f64, missed: f64) -> (Option<usize>, Option<usize>) {
    // By logarithms: the first of these numbers are none that a float holds.
    let mut logarithm = count as f64 * (1.0 - part).ln();
    let mut below = 0.0;
    let (mut low, mut high) = (None, None);
    for number in 0..=count {
        // The chance that so many samples at most lie below.
        below += logarithm.exp();
        if below <= missed {
            low = Some(number);
        }
        if high.is_none() && number < count && below >= 1.0 - missed {
            high = Some(number);
        }
        logarithm +=
            ((count - number) as f64 / (number + 1) as f64).ln() + (part / (1.0 - part)).ln();
    }
    (low, high)
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
    fn intervals_of_percentiles_are_those_of_the_tables() {
        // The median of 15 at 0.025 a side: 4th and 12th, as above.
        assert_eq!(ranks(15, 0.5, 0.025), (Some(3), Some(11)));
        // The longest of so many is longer than one of a hundred takes at 0.024 once 0.99^n is that small.
        assert_eq!(ranks(371, 0.99, 0.024).1, None);
        assert_eq!(ranks(372, 0.99, 0.024).1, Some(371));
        assert_eq!(ranks(5, 0.5, 0.025), (None, None));
    }

    #[test]
    fn a_tail_of_few_samples_has_no_upper_end() {
        let samples = |count| {
            (0..count)
                .map(|index| 100 + index % 50)
                .collect::<Vec<u64>>()
        };
        let few = tail(&samples(120));
        assert!(few.high.is_infinite() && few.low < few.value, "{few:?}");
        assert_eq!(few.within(1), "1.2 (1.1 or more)");
        let many = tail(&samples(5_000));
        assert!(
            many.low <= many.value && many.value <= many.high,
            "{many:?}"
        );
        assert!(many.high < 1.3, "{many:?}");
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
