//! Text for people: errors with their causes, each said once, and nothing that moves a cursor.

use std::error::Error;

/// An error with all its causes that it does not name itself.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Text from outside without control characters, which a terminal might obey.
pub fn harmless(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars()
        .map(|c| {
            if c.is_control() {
                c.escape_default().to_string()
            } else {
                c.to_string()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let cause = std::io::Error::other("no space");
        let error = anyhow::Error::new(cause).context("writing a: no space");
        assert_eq!(chain(error.as_ref()), "writing a: no space");
        let error = anyhow::Error::new(std::io::Error::other("no space")).context("writing a");
        assert_eq!(chain(error.as_ref()), "writing a: no space");
    }

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(harmless("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(harmless("ä.yaml"), "ä.yaml");
    }
}
