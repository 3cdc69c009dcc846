//! What a network's state on disk says. The plugin alone writes it; the agent reads it.
//!
//! The file is replaced as a whole, so whoever reads it sees all of one version, without any lock.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::Failure;

/// What tells this boot of the kernel from others.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// The present boot's id; `None` where the kernel does not say it.
pub fn this_boot() -> Option<String> {
    let boot = std::fs::read_to_string(BOOT).ok()?;
    Some(boot.trim().to_owned())
}

/// The end of a state file's name; the network's name comes before it.
pub const SUFFIX: &str = ".json";

/// Everything about a network on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The format's version, [`State::VERSION`].
    pub version: u32,
    /// The network's name.
    pub network: String,
    /// The boot in which it was written (/proc/sys/kernel/random/boot_id): the attachments of
    /// another one went with its kernel.
    #[serde(default)]
    pub boot: Option<String>,
    /// The address of each family that was given out last.
    #[serde(default)]
    pub cursors: Cursors,
    /// Who has which addresses.
    pub attachments: Vec<Attachment>,
    /// Addresses that were given back a moment ago, the longest ago first.
    #[serde(default)]
    pub released: Vec<Released>,
}

/// The address of each family that was given out last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursors {
    /// IPv4.
    #[serde(default)]
    pub v4: Option<IpAddr>,
    /// IPv6.
    #[serde(default)]
    pub v6: Option<IpAddr>,
}

/// An address that was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// Which.
    pub address: IpAddr,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

impl State {
    /// The only version of the format so far.
    pub const VERSION: u32 = 1;

    /// Nothing is attached yet.
    pub fn new(network: &str) -> Self {
        Self {
            version: Self::VERSION,
            network: network.to_owned(),
            boot: None,
            cursors: Cursors::default(),
            attachments: Vec::new(),
            released: Vec::new(),
        }
    }

    /// Where a network's state is in `folder`.
    pub fn path(folder: &Path, network: &str) -> PathBuf {
        folder.join(format!("{network}{SUFFIX}"))
    }

    /// Reads a state file; `None` if there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, Failure> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::io(format!("reading {}", path.display()))(error)),
        };
        let decode = |reason: String| Failure::Decode {
            what: path.display().to_string(),
            reason,
        };
        let unreadable = |reason: String| {
            decode(format!(
                "{reason}; it says who has which address, so it is not replaced by an empty one: \
                 put a copy back, or end every pod of the network on this node and remove the file"
            ))
        };
        let state: Self =
            serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        if state.version != Self::VERSION {
            return Err(decode(format!(
                "version {} is not {}; it was written by another release of the plugin, which has \
                 to be put back",
                state.version,
                Self::VERSION
            )));
        }
        let (mut keys, mut ips) = (HashSet::new(), HashSet::new());
        for attachment in &state.attachments {
            let key = &attachment.key;
            if !keys.insert(key) {
                return Err(unreadable(format!(
                    "{} of container {} is there twice",
                    key.ifname, key.container
                )));
            }
            if let Some(ip) = attachment.ips.iter().find(|ip| !ips.insert(**ip)) {
                return Err(unreadable(format!("{ip} belongs to two")));
            }
        }
        Ok(Some(state))
    }

    /// Takes note of the present boot; what is of an earlier one is gone, and nobody was there to
    /// say so.
    pub fn enter_boot(&mut self, boot: &str) {
        let earlier = self.boot.replace(boot.to_owned());
        if earlier.is_some_and(|earlier| earlier != boot) {
            self.attachments.clear();
            self.released.clear();
        }
    }

    /// The attachment of that name.
    pub fn attachment(&self, key: &AttachmentKey) -> Option<&Attachment> {
        self.attachments.iter().find(|found| found.key == *key)
    }
}

/// An attachment's name: what a runtime calls it by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// CNI_CONTAINERID.
    pub container: String,
    /// CNI_IFNAME, the interface's name inside the container.
    pub ifname: String,
}

/// An interface of a pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Its name.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// The name of the interface's end on the host.
    pub interface: String,
    /// The address of the end in the container.
    pub mac: Mac,
    /// The address of the end on the host.
    pub host_mac: Mac,
    /// Its addresses, at most one a family.
    pub ips: Vec<IpAddr>,
    /// Whose it is, as far as the runtime said (CNI_ARGS).
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Ports of the node that lead to it.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// How fast it may be.
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
}

/// A pod as Kubernetes runtimes name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// K8S_POD_NAMESPACE.
    pub namespace: String,
    /// K8S_POD_NAME.
    pub name: String,
    /// K8S_POD_UID, if it was said.
    #[serde(default)]
    pub uid: Option<String>,
}

/// An entry of the capability `portMappings`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// The address of the node; every one if there is none.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    /// The node's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// "tcp", "udp" or "sctp".
    pub protocol: String,
}

/// The capability `bandwidth`: bits per second and bits, 0 for unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// To the container.
    pub ingress_rate: u64,
    /// How much may come at once.
    pub ingress_burst: u64,
    /// From the container.
    pub egress_rate: u64,
    /// How much may come at once.
    pub egress_burst: u64,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no Ethernet address; write six octets like 02:00:00:00:00:01");
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(wrong)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(octets))
    }
}

/// A network's state as its file holds it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Saved {
    version: u32,
    #[serde(default)]
    boot: Option<String>,
    attachments: Vec<Attachment>,
}

/// The format's version.
pub const VERSION: u32 = 1;

/// The attachments that a network's file names, none if it is of an earlier boot. The file is replaced
/// whole, so no lock is needed.
pub fn read(path: &Path) -> Result<Vec<Attachment>, Failure> {
    let text = std::fs::read(path).map_err(Failure::io(format!("reading {}", path.display())))?;
    attachments(path, &text)
}

/// The same of the file's content.
pub fn attachments(path: &Path, text: &[u8]) -> Result<Vec<Attachment>, Failure> {
    let decode = |reason: String| Failure::Decode {
        what: path.display().to_string(),
        reason,
    };
    let saved: Saved = serde_json::from_slice(text).map_err(|error| decode(error.to_string()))?;
    if saved.version != VERSION {
        return Err(decode(format!(
            "version {} is not {VERSION}",
            saved.version
        )));
    }
    let is_past = saved
        .boot
        .zip(this_boot())
        .is_some_and(|(saved, this)| saved != this);
    Ok(if is_past {
        Vec::new()
    } else {
        saved.attachments
    })
}
