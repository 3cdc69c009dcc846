//! Whether an attachment is wired: what the CNI plugin asks at the end of ADD, and in CHECK.

use std::{path::PathBuf, sync::Arc};

use penstock_cni::{
    agent::Answer,
    state::{Attachment, AttachmentKey},
};
use rtnetlink::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use super::{Follower, lock};
use crate::{
    attach::{
        held::{Agreement, Holder},
        inspect::{self, Finding},
        peers::Peers,
    },
    dataplane::pins::Pins,
    model::port::PodPorts,
    network::{Endpoints, pods::Pods},
};

/// What connects pods.
pub struct Wiring {
    /// What the CNI plugin says.
    pub pods: Pods,
    /// What the programs are told of it.
    pub endpoints: Endpoints,
    /// Where that is found in the kernel.
    pub pins: Pins,
    /// Hears of the ports of this node that pods ask for, those first that came first.
    pub host_ports: watch::Sender<Option<Vec<PodPorts>>>,
    /// Questions whether an attachment is wired.
    pub requests: mpsc::Receiver<WireRequest>,
    /// Where they go on to, once it is but for its host ports.
    pub but_for_host_ports: mpsc::Sender<WireRequest>,
    /// Whether other plugins come after ours, for which clsact is in the way.
    pub is_chained: bool,
    /// Pods whose packets are left to the kernel.
    pub holder: Holder,
    /// What is said of that to whoever writes `CONFIG`.
    pub agreement: Arc<Agreement>,
    /// The pods' ends of their links.
    pub peers: Peers,
}

/// A question whether an attachment is wired.
pub struct WireRequest {
    /// Of which network.
    pub network: String,
    /// Which.
    pub attachment: AttachmentKey,
    /// Whether the kernel has to be asked, which may have lost what it was given.
    pub is_check: bool,
    /// Where its network namespace may be.
    pub netns: Option<PathBuf>,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

impl Follower {
    /// Says whether an attachment is wired; of its host ports another says so.
    pub(super) async fn answer(&mut self, handle: &Handle, request: WireRequest) {
        let found = match self.wired(&request) {
            Ok((attachment, index)) if request.is_check => self
                .inspect(handle, &attachment, index)
                .await
                .map(|()| attachment),
            Ok((attachment, _)) => Ok(attachment),
            Err(answer) => Err(answer),
        };
        match (found, &self.wiring) {
            (Ok(attachment), Some(wiring)) if !attachment.host_ports.is_empty() => {
                // Where too many wait the question is dropped, and asked again.
                let _ = wiring.but_for_host_ports.try_send(request);
            }
            // Who asked may have gone.
            (Ok(_), _) => drop(request.answer.send(Answer::Done)),
            (Err(answer), _) => drop(request.answer.send(answer)),
        }
    }

    /// An attachment and its interface's index, as far as this agent has connected it.
    fn wired(&self, request: &WireRequest) -> Result<(Attachment, u32), Answer> {
        let wiring = self.wiring.as_ref();
        if let Some(failure) = wiring.and_then(|wiring| wiring.pods.problem_of(&request.network)) {
            return Err(refusal(failure.to_string(), failure.passes()));
        }
        let status = lock(&self.status);
        let found = status
            .attachments
            .iter()
            .find(|(attachment, _)| attachment.key == request.attachment);
        let (attachment, index) = found.ok_or_else(|| {
            let what = "the state on disk does not name it; does the agent read the plugin's \
                        (--cni-state-dir)?";
            Answer::Failed(what.to_owned())
        })?;
        let Some(index) = index else {
            let followed = status
                .interfaces
                .values()
                .find(|followed| followed.name == attachment.interface);
            let error = followed.and_then(|followed| Some((followed.error.clone()?, followed)));
            return Err(match error {
                Some((error, followed)) => refusal(error, followed.is_passing),
                None => Answer::Failed(format!(
                    "the interface {} is not there, or does not match --pod-interfaces",
                    attachment.interface
                )),
            });
        };
        match &self.unwritten {
            Some((error, is_passing)) => Err(refusal(error.clone(), *is_passing)),
            None => Ok((attachment.clone(), *index)),
        }
    }

    /// Looks for what connects an attachment in the kernel. Lost hooks are put back at the next look.
    async fn inspect(
        &mut self,
        handle: &Handle,
        attachment: &Attachment,
        index: u32,
    ) -> Result<(), Answer> {
        let Some(wiring) = &self.wiring else {
            return Ok(());
        };
        let hooks = inspect::hooks(handle, &attachment.interface, index).await;
        if matches!(hooks, Err(Finding::Damage(_))) {
            lock(&self.status).interfaces.remove(&index);
        }
        // Others may have changed the pod's Ethernet address since it was wired.
        let followed = Attachment {
            mac: wiring.peers.mac(index).unwrap_or(attachment.mac),
            ..attachment.clone()
        };
        let found = hooks.and_then(|()| inspect::endpoints(&wiring.pins, &followed, index));
        found.map_err(Answer::from)
    }
}

/// No, for now or as things are.
fn refusal(reason: String, is_passing: bool) -> Answer {
    if is_passing {
        Answer::NotYet(reason)
    } else {
        Answer::Failed(reason)
    }
}

impl From<Finding> for Answer {
    fn from(finding: Finding) -> Self {
        match finding {
            Finding::Damage(reason) => Self::Failed(reason),
            Finding::Unknown(reason) => Self::NotYet(reason),
        }
    }
}
