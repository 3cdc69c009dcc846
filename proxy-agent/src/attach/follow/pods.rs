//! Pods of the CNI plugin that is ours: who they are, what others made of their links, and what the
//! programs are told of them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Instant,
};

use penstock_cni::error;
use rtnetlink::Handle;

use super::{Follower, PATIENCE, Present, lock};
use crate::{
    attach::{held, interface::Role, peers},
    network::pods,
};

impl Follower {
    /// Reads who this node's pods are; whether that could be read.
    pub(super) fn read_pods(&mut self) -> bool {
        let mut status = lock(&self.status);
        status.problems.clear();
        let read = self.wiring.as_mut().map(|wiring| wiring.pods.read());
        if let Some(Err(error)) = &read {
            let problem = format!("reading the CNI plugin's state: {error}");
            status.problems.push(problem);
        }
        !matches!(read, Some(Err(_)))
    }

    /// Looks at what others made of pods' links: other Ethernet addresses, and queueing disciplines that
    /// have to see what pods send. Whether nothing is left to do.
    pub(super) async fn follow_pods(
        &mut self,
        handle: &Handle,
        present: &Present,
    ) -> Result<bool, rtnetlink::Error> {
        let Some(wiring) = &mut self.wiring else {
            return Ok(true);
        };
        let filtered = held::filtered(handle).await?;
        let indices: HashMap<&str, u32> = present
            .iter()
            .filter(|(_, link)| link.role == Role::Pod)
            .map(|(index, link)| (link.name.as_str(), *index))
            .collect();
        let (mut made, mut wanted) = (BTreeMap::new(), held::Interfaces::new());
        for attachment in wiring.pods.attachments() {
            let Some(index) = indices.get(attachment.interface.as_str()).copied() else {
                continue;
            };
            if filtered.contains(&index) {
                wanted.insert(index, attachment.interface.clone());
            }
            let link = present.get(&index);
            let Some((namespace, index_there)) =
                link.and_then(|link| link.namespace.zip(link.other_end))
            else {
                continue;
            };
            let peer = peers::Made {
                peer: peers::Place {
                    namespace,
                    index: index_there,
                },
                mac: attachment.mac,
                host_mac: attachment.host_mac,
                ips: attachment.ips.clone(),
            };
            made.insert(index, peer);
        }
        let is_known = wiring.peers.look(handle, &mut self.files, &made).await;
        let name_of = |index| present.get(&index).map(|link| link.name.as_str());
        let agreement = &wiring.agreement;
        let held = wiring
            .holder
            .hold(handle, &wanted, agreement, name_of)
            .await;
        let is_held = held.is_ok();
        if let Err(problem) = held {
            lock(&self.status).problems.push(problem);
        }
        Ok(is_known && is_held)
    }

    /// Makes `ENDPOINTS` name the pods whose interfaces have their hooks; whether that is done.
    pub(super) fn write_endpoints(&mut self, present: &Present) -> bool {
        let Some(wiring) = &mut self.wiring else {
            return true;
        };
        let mut status = lock(&self.status);
        let attached: HashMap<&str, u32> = status
            .interfaces
            .iter()
            .filter(|(_, followed)| followed.is_attached)
            .map(|(index, followed)| (followed.name.as_str(), *index))
            .collect();
        let index_of = |name: &str| attached.get(name).copied();
        let macs = wiring.peers.macs();
        let link_of = |name: &str| {
            let index = index_of(name)?;
            Some(pods::Link {
                index,
                is_shaped: present.get(&index).is_some_and(|link| link.is_shaped),
                mac: macs.get(&index).map(|mac| mac.0),
            })
        };
        let written = wiring.endpoints.set(wiring.pods.endpoints(link_of));
        let attachments: Vec<_> = wiring
            .pods
            .attachments()
            .map(|attachment| (attachment.clone(), index_of(&attachment.interface)))
            .collect();
        if status.attachments != attachments {
            self.patience = PATIENCE;
            status.attachments = attachments;
        }
        // The plugin removes the interface before it forgets the pod, and says neither.
        let is_between = status.attachments.iter().any(|(_, index)| index.is_none());
        let is_awaited = is_between && self.patience > 0;
        self.patience = self.patience.saturating_sub(u32::from(is_between));
        let there: HashSet<&str> = status
            .interfaces
            .values()
            .map(|followed| followed.name.as_str())
            .collect();
        let host_ports = wiring.pods.host_ports(|name| there.contains(name));
        let attachments = status.attachments.iter();
        let gone = attachments.filter(|(found, _)| !there.contains(found.interface.as_str()));
        let gone = gone.map(|(found, _)| {
            let since = status.gone.get(&found.key).copied();
            (found.key.clone(), since.unwrap_or_else(Instant::now))
        });
        status.gone = gone.collect();
        wiring.host_ports.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&host_ports);
            *known = Some(host_ports);
            is_new
        });
        status
            .problems
            .extend(wiring.pods.problems().map(ToString::to_string));
        self.unwritten = None;
        match written {
            Ok(_) => !is_awaited,
            Err(error) => {
                tracing::warn!("{error}; pods are routed by the kernel until then");
                status.problems.push(error.to_string());
                self.unwritten = Some((error.to_string(), error::chain_passes(&error)));
                false
            }
        }
    }
}
