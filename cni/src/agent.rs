//! What is said over the agent's socket: a question and an answer, each one line of JSON, then the
//! agent closes.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

use crate::{error::Failure, state::AttachmentKey};

/// How long the agent may take to accept.
const CONNECT: Duration = Duration::from_secs(1);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// No answer is longer, in bytes.
const LIMIT: u64 = 64 << 10;

/// The socket's name in the run directory.
pub const SOCKET: &str = "agent.sock";

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// How the agent is. The answer is a report of its own, for the command line.
    Report,
    /// All ports that the kernel serves, for the command line: far more than a report.
    Ports,
    /// Whether pods can be given a network now.
    Ready,
    /// The network's state has this attachment and its interface is there: wire it.
    Wire {
        /// The network whose state it is in.
        network: String,
        /// Which of its attachments.
        attachment: AttachmentKey,
        /// Where the plugin sees its network namespace: the agent, if it sees it there too, need not
        /// look for it among all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        netns: Option<PathBuf>,
    },
    /// Whether the kernel has all that connects this attachment, as far as that is the agent's to put
    /// there.
    Check {
        /// The network whose state it is in.
        network: String,
        /// Which of its attachments.
        attachment: AttachmentKey,
    },
}

/// The answer to [`Request::Ready`], [`Request::Wire`] and [`Request::Check`].
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

/// Asks the agent whose socket is in `run_dir`. That there is none, or that it does not answer, is
/// temporary: it is being started, or replaced.
pub async fn ask(run_dir: &Path, request: &Request) -> Result<Answer, Failure> {
    let path = run_dir.join(SOCKET);
    let silent = |reason: String| {
        Failure::TryAgain(format!(
            "the node's agent is not there ({}: {reason}); see that the penstock pod of this node \
             runs",
            path.display()
        ))
    };
    let late = |what: &str, limit: Duration| silent(format!("{what} within {} s", limit.as_secs()));
    let mut stream = timeout(CONNECT, UnixStream::connect(&path))
        .await
        .map_err(|_| late("it did not accept", CONNECT))?
        .map_err(|error| silent(error.to_string()))?;
    let talk = async {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        stream.take(LIMIT).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = timeout(ANSWER, talk)
        .await
        .map_err(|_| late("it did not answer", ANSWER))?
        .map_err(|error| silent(error.to_string()))?;
    // An answer is a line: one that is not whole is of an agent that ended.
    if answer.last() != Some(&b'\n') {
        return Err(silent("it closed without an answer".to_owned()));
    }
    serde_json::from_slice(&answer).map_err(|error| Failure::Decode {
        what: format!("the answer of the node's agent at {}", path.display()),
        reason: format!("{error}; agent and plugin are of different releases"),
    })
}
