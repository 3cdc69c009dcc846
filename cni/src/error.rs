//! What can go wrong, with the code that the CNI specification gives it (SPEC.md 1.1.0, "Error").

use std::{io, net::IpAddr, path::PathBuf};

use nix::errno::Errno;
use serde_json::{Value, json};

use crate::version::Version;

/// The code of what passes by itself.
const TRY_AGAIN: u32 = 11;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration is of a version that this plugin does not speak.
    #[error("CNI version {0:?} is not spoken here; use one of 0.3.1, 0.4.0, 1.0.0 and 1.1.0")]
    IncompatibleVersion(String),
    /// The command does not exist in the configuration's version.
    #[error("{command} exists since CNI version {since}, and the configuration is of {version}")]
    CommandVersion {
        /// CNI_COMMAND.
        command: String,
        /// The first version that has it.
        since: Version,
        /// The configuration's version.
        version: Version,
    },
    /// The container is gone: there is nothing to clean up either.
    #[error("the network namespace {} is gone", .0.display())]
    UnknownContainer(PathBuf),
    /// An environment variable is missing or malformed.
    #[error("{variable} {reason}")]
    Environment {
        /// Which.
        variable: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done, to which file.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Standard input or a file is not what it should be.
    #[error("{what}: {reason}")]
    Decode {
        /// What was read.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The network configuration can't be meant.
    #[error("{field}: {reason}")]
    Config {
        /// Which field.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// It can't be done now, and perhaps soon.
    #[error("{0}")]
    TryAgain(String),
    /// The plugin can't serve at all for now.
    #[error("{0}")]
    NotAvailable(String),
    /// Every address is in use.
    #[error(
        "all {capacity} addresses of {range} are in use; end pods on this node, or give it a larger \
         podCIDR"
    )]
    Exhausted {
        /// The range.
        range: String,
        /// How many addresses it has for pods.
        capacity: u128,
    },
    /// The kernel refused something.
    #[error("{what}: {}", reason(source))]
    Kernel {
        /// What was asked, about which interface.
        what: String,
        /// Why not.
        #[source]
        source: rtnetlink::Error,
    },
    /// CHECK found something else than ADD had made.
    #[error("{0}")]
    Mismatch(String),
    /// An address that was asked for can't be had.
    #[error("{address} {reason}")]
    Address {
        /// The address.
        address: IpAddr,
        /// Why not.
        reason: String,
    },
    /// The agent can't do it, now or later.
    #[error("the node's agent can't wire the pod: {0}")]
    Agent(String),
    /// The plugin itself is wrong.
    #[error("this is a mistake in penstock-cni, please report it: {0}")]
    Internal(String),
}

/// The kernel's reason in its usual words, without the request's bytes.
fn reason(error: &rtnetlink::Error) -> String {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
        rtnetlink::Error::RequestFailed => "the netlink socket closed; try again".to_owned(),
        other => other.to_string(),
    }
}

/// Whether what the kernel refuses with this error passes by itself: it is busy, or short of something
/// that others give back. A full disk is not among it, which somebody has to clear.
pub fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(
            Errno::EAGAIN
                | Errno::EBUSY
                | Errno::EINTR
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOBUFS
                | Errno::ENOMEM
                | Errno::ETIMEDOUT
        )
    )
}

/// Whether an error goes back to one that passes by itself.
pub fn chain_passes(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(passes) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Failure {
    /// A field of the configuration that can't be meant.
    pub fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A variable that is missing or malformed.
    pub fn environment(variable: &'static str, reason: impl Into<String>) -> Self {
        Self::Environment {
            variable,
            reason: reason.into(),
        }
    }

    /// An I/O failure with what was done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// A refusal of the kernel's with what was asked.
    pub fn kernel(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }

    /// Whether the same may succeed soon, without anybody doing anything about it.
    pub fn passes(&self) -> bool {
        match self {
            Self::TryAgain(_) => true,
            Self::Io { source, .. } => passes(source),
            Self::Kernel { source, .. } => match source {
                rtnetlink::Error::NetlinkError(message) => {
                    let error = message.to_io();
                    // Somebody removed the link that it is about; a DEL, in most cases.
                    let is_gone = error.raw_os_error() == Some(Errno::ENODEV as i32);
                    is_gone || passes(&error)
                }
                // The socket was closed, for want of memory in most cases.
                rtnetlink::Error::RequestFailed => true,
                _ => false,
            },
            _ => false,
        }
    }

    /// The code: 1 to 99 are the specification's, from 100 on they are this plugin's.
    pub fn code(&self) -> u32 {
        match self {
            _ if self.passes() => TRY_AGAIN,
            Self::IncompatibleVersion(_) | Self::CommandVersion { .. } => 1,
            Self::UnknownContainer(_) => 3,
            Self::Environment { .. } => 4,
            Self::Io { .. } => 5,
            Self::Decode { .. } => 6,
            Self::Config { .. } => 7,
            Self::TryAgain(_) => TRY_AGAIN,
            Self::NotAvailable(_) => 50,
            Self::Exhausted { .. } => 100,
            Self::Kernel { .. } => 101,
            Self::Mismatch(_) => 102,
            Self::Address { .. } => 103,
            Self::Agent(_) => 104,
            Self::Internal(_) => 105,
        }
    }

    /// The sort of failure in a few words that never differ.
    fn summary(&self) -> &'static str {
        match self {
            _ if self.passes() => "try again later",
            Self::IncompatibleVersion(_) | Self::CommandVersion { .. } => {
                "incompatible CNI version"
            }
            Self::UnknownContainer(_) => "unknown container",
            Self::Environment { .. } => "invalid environment variable",
            Self::Io { .. } => "I/O failure",
            Self::Decode { .. } => "failed to decode content",
            Self::Config { .. } => "invalid network config",
            Self::TryAgain(_) => "try again later",
            Self::NotAvailable(_) => "plugin not available",
            Self::Exhausted { .. } => "no address left",
            Self::Kernel { .. } => "the kernel refused",
            Self::Mismatch(_) => "the attachment is not as it was made",
            Self::Address { .. } => "the address can't be had",
            Self::Agent(_) => "the agent refused",
            Self::Internal(_) => "internal error",
        }
    }

    /// The error object, for a runtime that spoke `version`.
    pub fn to_json(&self, version: Version) -> Value {
        json!({
            "cniVersion": version.as_str(),
            "code": self.code(),
            "msg": format!("penstock: {}", self.summary()),
            "details": self.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::ErrorMessage;

    use super::*;

    #[test]
    fn what_passes_by_itself_is_to_be_tried_again() {
        let io = |errno: Errno| Failure::io("doing it")(io::Error::from(errno)).code();
        let kernel = |errno: Errno| {
            let mut message = ErrorMessage::default();
            message.code = std::num::NonZeroI32::new(-(errno as i32));
            Failure::kernel("doing it")(rtnetlink::Error::NetlinkError(message)).code()
        };
        for errno in [
            Errno::EAGAIN,
            Errno::EBUSY,
            Errno::EINTR,
            Errno::EMFILE,
            Errno::ENFILE,
            Errno::ENOBUFS,
            Errno::ENOMEM,
        ] {
            assert_eq!((io(errno), kernel(errno)), (11, 11), "{errno}");
        }
        for errno in [Errno::ENOSPC, Errno::EROFS, Errno::EDQUOT, Errno::EIO] {
            assert_eq!(io(errno), 5, "{errno}");
        }
        assert_eq!((io(Errno::ENODEV), kernel(Errno::ENODEV)), (5, 11));
        for errno in [Errno::EEXIST, Errno::EOPNOTSUPP, Errno::EPERM] {
            assert_eq!(kernel(errno), 101, "{errno}");
        }
        let closed = Failure::kernel("asking")(rtnetlink::Error::RequestFailed);
        assert_eq!(closed.code(), 11);
        let said = closed.to_json(Version::LATEST);
        assert_eq!(said.get("msg"), Some(&json!("penstock: try again later")));
        // However deep it is.
        let wrapped = Failure::io("reading")(io::Error::from(Errno::ENOMEM));
        assert!(chain_passes(&wrapped));
        assert!(!chain_passes(&Failure::io("reading")(io::Error::from(
            Errno::EIO
        ))));
    }
}
