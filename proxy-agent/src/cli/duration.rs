//! Durations as Go programs, kube-proxy among them, write them on a command line.
//!
//! The grammar is that of Go's time.ParseDuration: numbers with units, one after the other, such as
//! `1h30m` or `1.5s`.

use std::time::Duration;

/// Units, those first that begin with another.
const UNITS: [(&str, f64); 8] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("\u{b5}s", 1e-6),
    ("\u{3bc}s", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3_600.0),
];

/// Why a text is no duration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum DurationError {
    /// It is not of the form.
    #[error("{0:?} is no duration; write 24h0m0s, 90s or 1m30s")]
    Form(String),
    /// It can't be less than nothing.
    #[error("{0:?} is negative")]
    Negative(String),
    /// Flows are timed in seconds.
    #[error("{0:?} is less than a second")]
    Short(String),
    /// Longer than any connection.
    #[error("{0:?} is longer than a year")]
    Long(String),
}

/// Reads a duration.
fn parse(text: &str) -> Result<Duration, DurationError> {
    let form = || DurationError::Form(text.to_owned());
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.starts_with('-') {
        return Err(DurationError::Negative(text.to_owned()));
    }
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(form());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(form)?;
        let (number, tail) = rest.split_at(end);
        let number: f64 = number.parse().map_err(|_| form())?;
        let (unit, length) = UNITS
            .iter()
            .find(|(unit, _)| tail.starts_with(unit) && !is_longer(tail, unit))
            .ok_or_else(form)?;
        seconds += number * length;
        rest = tail.strip_prefix(unit).unwrap_or_default();
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| DurationError::Long(text.to_owned()))
}

/// Whether a unit is only the beginning of one: `m` of `ms`.
fn is_longer(tail: &str, unit: &str) -> bool {
    let rest = tail.strip_prefix(unit).unwrap_or_default();
    rest.starts_with(|c: char| c.is_alphabetic())
}

/// Reads for how long a flow may be idle, in whole seconds, begun ones counted; 0 where the default
/// is meant, as in kube-proxy.
pub(super) fn idle_secs(text: &str) -> Result<u32, DurationError> {
    const YEAR: u64 = 365 * 24 * 3_600;
    let duration = parse(text)?;
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    if !duration.is_zero() && duration < Duration::from_secs(1) {
        return Err(DurationError::Short(text.to_owned()));
    }
    match u32::try_from(seconds) {
        Ok(whole) if seconds <= YEAR => Ok(whole),
        _ => Err(DurationError::Long(text.to_owned())),
    }
}

/// Seconds as Go prints them: `24h0m0s`.
pub(super) fn show(seconds: u32) -> String {
    let (hours, minutes, rest) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, seconds) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30),
            ("1h0m0s", 3_600),
            ("24h0m0s", 86_400),
            ("1m30s", 90),
            ("+1.5h", 5_400),
            ("1.2s", 2),
            ("1000ms", 1),
            ("2000000us", 2),
            ("3000000\u{b5}s", 3),
            ("1m500ms", 61),
            (".5m", 30),
        ] {
            assert_eq!(idle_secs(text), Ok(seconds), "{text}");
        }
        for text in [
            "", "5", "s", "1d", "1h 2m", "1..5s", "h1", "1sm", "1e3s", "NaNs", ".s",
        ] {
            let error = idle_secs(text);
            assert_eq!(error, Err(DurationError::Form(text.to_owned())), "{text}");
        }
        let negative = DurationError::Negative("-1s".to_owned());
        assert_eq!(idle_secs("-1s"), Err(negative));
        let short = DurationError::Short("10ms".to_owned());
        assert_eq!(idle_secs("10ms"), Err(short));
        for text in ["8761h", "99999999999999999999h"] {
            let long = DurationError::Long(text.to_owned());
            assert_eq!(idle_secs(text), Err(long), "{text}");
        }
    }

    #[test]
    fn what_is_shown_is_read_again() {
        for seconds in [0, 1, 59, 60, 61, 3_599, 3_600, 86_400, 90_061] {
            assert_eq!(idle_secs(&show(seconds)), Ok(seconds), "{seconds}");
        }
        assert_eq!(show(86_400), "24h0m0s");
    }
}
