//! The versions of the specification that are spoken, and what each can say.

use std::fmt;

use serde_json::{Value, json};

use crate::error::Failure;

/// A version of the CNI specification. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: an address no longer says its family.
    V1_0_0,
    /// 1.1.0: GC, STATUS, an interface's MTU.
    V1_1_0,
}

impl Version {
    /// All of them, the oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// What an answer is in when nobody asked for a version.
    pub const LATEST: Self = Self::V1_1_0;

    /// As the specification writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version of a network configuration: `cniVersion`, and 0.1.0, which is not spoken, where
    /// there is none.
    pub fn of_config(config: &Value) -> Result<Self, Failure> {
        let text = match config.get("cniVersion") {
            None => "0.1.0",
            Some(Value::String(text)) => text,
            Some(_) => {
                return Err(Failure::config(
                    "cniVersion",
                    "is not a string; write for example \"1.1.0\"",
                ));
            }
        };
        let found = Self::ALL.into_iter().find(|known| known.as_str() == text);
        found.ok_or_else(|| Failure::IncompatibleVersion(text.to_owned()))
    }

    /// The answer to VERSION.
    pub fn report(asked: &str) -> Value {
        json!({
            "cniVersion": asked,
            "supportedVersions": Self::ALL.map(Self::as_str),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
