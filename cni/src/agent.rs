//! What is said over the agent's socket: a question and an answer, each one line of JSON, then the
//! agent closes.

use serde::{Deserialize, Serialize};

use crate::state::AttachmentKey;

/// The socket's name in the run directory.
pub const SOCKET: &str = "agent.sock";

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Everything about the agent. The answer is a report of its own, for the command line.
    Report,
    /// Whether pods can be given a network now.
    Ready,
    /// The network's state has this attachment and its interface is there: wire it.
    Wire {
        /// The network whose state it is in.
        network: String,
        /// Which of its attachments.
        attachment: AttachmentKey,
    },
}

/// The answer to [`Request::Ready`] and [`Request::Wire`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// It is so.
    Done,
    /// It can't be now, for this reason.
    NotYet(String),
    /// It can't be.
    Failed(String),
}
