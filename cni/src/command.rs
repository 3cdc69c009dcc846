//! The commands: what each does, in which order, and what it undoes where it fails.
//!
//! The state names an attachment before its link is made and until after it is gone, so that a
//! plugin that is killed at any point leaves nothing that DEL or GC would not find.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    agent::{self, Answer},
    config::{Config, Wishes},
    error::Failure,
    ledger::Wanted,
    link::{self, Ends},
    names,
    netlink::Netlink,
    netns::Netns,
    network::{FILE, Network},
    previous::Previous,
    request::{Request, Target},
    result::{self, Made},
    shape::Limit,
    state::{Attachment, AttachmentKey, Mac, State},
    store::{self, Store, now},
    version::Version,
};

/// Carries a request out.
pub async fn run(request: Request) -> Result<Option<Value>, Failure> {
    match request {
        Request::Add(config, target, wishes) => add(&config, &target, *wishes).await.map(Some),
        Request::Del(config, key, netns) => delete(&config, &key, netns).await.map(|()| None),
        Request::Check(config, target, previous) => {
            check(&config, &target, &previous).await.map(|()| None)
        }
        Request::Gc(config, valid) => collect(&config, &valid).await.map(|()| None),
        Request::Status(config) => status(&config).await.map(|()| None),
        Request::Version(asked) => Ok(Some(Version::report(&asked))),
    }
}

fn open(netns: &Path) -> Result<Netns, Failure> {
    let netns = Netns::open(netns)?.ok_or_else(|| Failure::UnknownContainer(netns.to_owned()))?;
    if netns.is_own()? {
        return Err(Failure::environment(
            "CNI_NETNS",
            format!(
                "is {}, the network namespace of the host; it has to be a container's own",
                netns.path().display()
            ),
        ));
    }
    Ok(netns)
}

/// The node's network, which the agent has to have described.
fn network(config: &Config) -> Result<Network, Failure> {
    let network = Network::read(&config.run_dir)?;
    let network = network.filter(|network| !network.pod_cidrs.is_empty());
    network.ok_or_else(|| {
        Failure::TryAgain(format!(
            "the node's agent has not yet said in {} which addresses its pods have; see that the \
             penstock pod of this node runs, and that the node has a podCIDR",
            config.run_dir.join(FILE).display()
        ))
    })
}

/// A bucket that holds no packet is refused before anything is made.
fn check_limits(wishes: &Wishes, mtu: u32) -> Result<(), Failure> {
    let Some(bandwidth) = wishes.capabilities.bandwidth else {
        return Ok(());
    };
    for (field, rate, burst) in [
        (
            "ingressBurst",
            bandwidth.ingress_rate,
            bandwidth.ingress_burst,
        ),
        ("egressBurst", bandwidth.egress_rate, bandwidth.egress_burst),
    ] {
        if let Some(limit) = Limit::from_bits(rate, burst) {
            limit.fits(mtu, &format!("runtimeConfig.bandwidth.{field}"))?;
        }
    }
    Ok(())
}

async fn add(config: &Config, target: &Target, wishes: Wishes) -> Result<Value, Failure> {
    let network = network(config)?;
    let mtu = wishes.mtu.unwrap_or(network.mtu);
    check_limits(&wishes, mtu)?;
    let netns = open(&target.netns).map_err(|failure| unless_it_left(config, target, failure))?;
    let ends = Ends::open(netns)?;
    let mut ips = wishes.arguments.ips;
    for ip in wishes.capabilities.ips {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    let (former, attachment) = {
        // The lock is not held while anything is asked of the kernel or the agent.
        let mut store = Store::open(&config.state_dir, &config.name)?;
        let wanted = Wanted {
            pod: wishes.arguments.pod,
            host_ports: wishes.capabilities.host_ports,
            bandwidth: wishes.capabilities.bandwidth,
            ips,
            others: store::others(&config.state_dir, &config.name)?,
        };
        let former = store.state().attachment(&target.key).cloned();
        let reserve =
            |state: &mut State| state.reserve(&target.key, &network.pod_cidrs, wanted, now());
        (former, store.change(reserve)?)
    };
    release_elsewhere(config, &target.key)?;
    let mut adding = Adding {
        config,
        ends: &ends,
        attachment: &attachment,
        agent_knows: false,
    };
    // Runtimes repeat what they don't know the outcome of; what works is left alone then.
    let is_there = former.as_ref() == Some(&attachment) && ends.verify(&attachment).await.is_ok();
    if is_there {
        adding.wire().await?;
    } else if let Err(failure) = adding.make(mtu).await {
        adding.undo().await;
        return Err(failure);
    }
    let made = Made {
        attachment: &attachment,
        netns: &target.netns,
        mtu,
    };
    result::build(config.version, wishes.previous, wishes.dns.as_ref(), &made)
}

/// A container that is gone needs no DEL, which is what its code says, unless it was here before.
fn unless_it_left(config: &Config, target: &Target, failure: Failure) -> Failure {
    let state = State::read(&State::path(&config.state_dir, &config.name));
    let is_known =
        state.is_ok_and(|state| state.is_some_and(|state| state.attachment(&target.key).is_some()));
    match failure {
        Failure::UnknownContainer(netns) if is_known => Failure::environment(
            "CNI_NETNS",
            format!(
                "is {}, which is gone, and the container has addresses from before; DEL gives them back",
                netns.display()
            ),
        ),
        other => other,
    }
}

/// An attachment that has its addresses.
struct Adding<'a> {
    config: &'a Config,
    ends: &'a Ends,
    attachment: &'a Attachment,
    /// Whether anybody else may have heard of its addresses.
    agent_knows: bool,
}

impl Adding<'_> {
    async fn make(&mut self, mtu: u32) -> Result<(), Failure> {
        let Self {
            config,
            ends,
            attachment,
            ..
        } = *self;
        let alias = names::alias(&config.name, &attachment.key, attachment.pod.as_ref());
        let made = match ends.make(attachment, &alias, mtu).await {
            Ok(()) => self.wire().await,
            Err(failure) => Err(failure),
        };
        // A DEL in the meantime did not find the link, perhaps, but it took the state away. Or it did, and
        // that is why the rest failed.
        let state = State::read(&State::path(&config.state_dir, &config.name))?;
        if state.is_some_and(|state| state.attachment(&attachment.key) == Some(attachment)) {
            return made;
        }
        Err(Failure::TryAgain(format!(
            "{} of container {} was deleted while it was added",
            attachment.key.ifname, attachment.key.container
        )))
    }

    async fn wire(&mut self) -> Result<(), Failure> {
        self.agent_knows = true;
        let request = agent::Request::Wire {
            network: self.config.name.clone(),
            attachment: self.attachment.key.clone(),
            netns: Some(self.ends.netns().to_owned()),
        };
        match agent::ask(&self.config.run_dir, &request).await? {
            Answer::Done => Ok(()),
            Answer::NotYet(reason) => Err(not_yet(&reason)),
            Answer::Failed(reason) => Err(Failure::Agent(reason)),
        }
    }

    /// Takes away what was made. A failure here would hide the one that matters; what stays is named
    /// by the state, and the runtime's DEL will find it.
    async fn undo(&self) {
        let Self {
            config,
            ends,
            attachment,
            agent_knows,
        } = *self;
        if link::remove(ends.host(), attachment, None).await.is_err() {
            return;
        }
        let Ok(mut store) = Store::open(&config.state_dir, &config.name) else {
            return;
        };
        let release = |state: &mut State| {
            // Only what this very ADD made, not what another has made since.
            if state.attachment(&attachment.key) == Some(attachment) {
                state.release(&attachment.key, agent_knows, now());
            }
            Ok(())
        };
        let _ = store.change(release);
    }
}

/// The agent can't do it for now.
fn not_yet(reason: &str) -> Failure {
    Failure::TryAgain(format!("the node's agent can't wire the pod yet: {reason}"))
}

/// The links that an attachment of that name would have, whether or not the state knows it.
fn expected(key: &AttachmentKey) -> Attachment {
    Attachment {
        key: key.clone(),
        interface: names::interface(key),
        mac: names::container_mac(key),
        host_mac: names::host_mac(key),
        ips: Vec::new(),
        pod: None,
        host_ports: Vec::new(),
        bandwidth: None,
    }
}

async fn delete(
    config: &Config,
    key: &AttachmentKey,
    netns: Option<PathBuf>,
) -> Result<(), Failure> {
    let attachment = expected(key);
    let host = Netlink::host()?;
    // Whatever is wrong with the namespace, nothing inside it is left to care for.
    let netns = netns.and_then(|path| Netns::open(&path).ok().flatten());
    link::remove(&host, &attachment, netns.as_ref()).await?;
    if let Some(mut store) = Store::open_existing(&config.state_dir, &config.name)? {
        store.change(|state| Ok(state.release(key, true, now())))?;
    }
    release_elsewhere(config, key)?;
    // An ADD that was under way may have made the link just before it lost its addresses.
    host.delete(&attachment.interface).await.map(drop)
}

/// Gives back what an attachment has in the states of other networks: runtimes call by the name that a
/// network has now, and it may have had another one when the attachment was made. A container has one
/// interface of that name, whatever the network.
fn release_elsewhere(config: &Config, key: &AttachmentKey) -> Result<(), Failure> {
    for network in store::networks(&config.state_dir)? {
        let path = State::path(&config.state_dir, &network);
        // Of one that can't be read nobody knows whom it names. The agent says so, too.
        let Ok(Some(state)) = State::read(&path) else {
            continue;
        };
        if network == config.name || state.attachment(key).is_none() {
            continue;
        }
        if let Some(mut store) = Store::open_existing(&config.state_dir, &network)? {
            store.change(|state| Ok(state.release(key, true, now())))?;
        }
    }
    Ok(())
}

async fn check(config: &Config, target: &Target, previous: &Previous) -> Result<(), Failure> {
    let path = State::path(&config.state_dir, &config.name);
    let own = State::read(&path)?.unwrap_or_else(|| State::new(&config.name));
    let others = match own.attachment(&target.key) {
        Some(_) => Vec::new(),
        None => store::others(&config.state_dir, &config.name)?,
    };
    let mut states = std::iter::once(&own).chain(&others);
    let found = states.find_map(|state| Some((&state.network, state.attachment(&target.key)?)));
    let (network, attachment) = found.ok_or_else(|| {
        Failure::Mismatch(format!(
            "{} does not know {} of container {}",
            path.display(),
            target.key.ifname,
            target.key.container
        ))
    })?;
    let attachment = compare(attachment, &target.netns, previous)?;
    Ends::open(open(&target.netns)?)?
        .verify(&attachment)
        .await?;
    let request = agent::Request::Check {
        network: network.clone(),
        attachment: target.key.clone(),
    };
    // That no agent answers is no mismatch, for which a runtime might make the pod anew: the kernel goes
    // on with what it has, and whether that is right can be told once an agent is back.
    match agent::ask(&config.run_dir, &request).await? {
        Answer::Done => Ok(()),
        Answer::NotYet(reason) => Err(Failure::TryAgain(format!(
            "the node's agent can't tell whether the pod is wired: {reason}"
        ))),
        Answer::Failed(reason) => Err(Failure::Mismatch(reason)),
    }
}

/// Whether the result that the runtime keeps is the one that ADD gave, and the attachment as that has
/// it: plugins later in a chain may change the Ethernet address of the container's end (`tuning`), and
/// the agent follows them.
fn compare(
    attachment: &Attachment,
    netns: &Path,
    previous: &Previous,
) -> Result<Attachment, Failure> {
    let text = |value: &Value, key: &str| {
        value
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_ascii_lowercase()
    };
    let netns = netns.to_string_lossy().to_ascii_lowercase();
    let mac_of = |name: &str, sandbox: &str| {
        let is_it = |found: &&Value| {
            text(found, "name") == name.to_ascii_lowercase() && text(found, "sandbox") == sandbox
        };
        let found = previous.list("interfaces").iter().find(is_it);
        found.and_then(|found| Mac::try_from(text(found, "mac")).ok())
    };
    let (host, container) = (&attachment.interface, &attachment.key.ifname);
    if mac_of(host, "") != Some(attachment.host_mac) {
        return Err(Failure::Mismatch(format!(
            "prevResult.interfaces has no {host} with the Ethernet address {}",
            attachment.host_mac
        )));
    }
    let mac = mac_of(container, &netns).ok_or_else(|| {
        Failure::Mismatch(format!(
            "prevResult.interfaces has no {container} with an Ethernet address in the container"
        ))
    })?;
    for ip in &attachment.ips {
        let address = format!("{ip}/{}", crate::netlink::bits(*ip));
        if !previous
            .list("ips")
            .iter()
            .any(|found| text(found, "address") == address)
        {
            return Err(Failure::Mismatch(format!(
                "prevResult.ips has no {address}"
            )));
        }
    }
    Ok(Attachment {
        mac,
        ..attachment.clone()
    })
}

async fn collect(config: &Config, valid: &[AttachmentKey]) -> Result<(), Failure> {
    let valid: HashSet<&AttachmentKey> = valid.iter().collect();
    // Held to the end: what is added meanwhile waits.
    let mut store = Store::open_existing(&config.state_dir, &config.name)?;
    let host = Netlink::host()?;
    let kept: HashSet<String> = valid.iter().map(|key| names::interface(key)).collect();
    let attachments = store.iter().flat_map(|store| &store.state().attachments);
    let known: HashSet<&str> = attachments.map(|found| found.interface.as_str()).collect();
    let prefix = names::alias_prefix(&config.name);
    for link in host.links().await? {
        let is_ours = known.contains(link.name.as_str())
            || link.alias.is_some_and(|alias| alias.starts_with(&prefix));
        // Both a name and an owner of ours: others may call links as they like.
        if is_ours && names::is_interface(&link.name) && !kept.contains(&link.name) {
            host.delete(&link.name).await?;
        }
    }
    match &mut store {
        Some(store) => store
            .change(|state| Ok(state.release_all_but(&valid, now())))
            .map(drop),
        None => Ok(()),
    }
}

/// Whether ADD would succeed, as far as the node is concerned. Whatever it is that keeps it from that,
/// runtimes know one code for it. That addresses run out is not among these: a node without room for one
/// more pod is no less ready.
async fn status(config: &Config) -> Result<(), Failure> {
    let unavailable = |failure: Failure| Failure::NotAvailable(failure.to_string());
    network(config).map_err(unavailable)?;
    State::read(&State::path(&config.state_dir, &config.name)).map_err(unavailable)?;
    match agent::ask(&config.run_dir, &agent::Request::Ready)
        .await
        .map_err(unavailable)?
    {
        Answer::Done => Ok(()),
        Answer::NotYet(reason) | Answer::Failed(reason) => Err(Failure::NotAvailable(format!(
            "the node's agent is not ready: {reason}"
        ))),
    }
}
