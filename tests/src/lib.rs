//! Nodes, pods and clients as network namespaces, for tests, demo and benchmarks.
//!
//! A [`Testbed`] is a bridge in a namespace of its own, with nodes around it. Each [`Node`] has its
//! own namespace, cgroup, bpffs folder and manifests, and routes to the other nodes' pods; each
//! [`Pod`] hangs on a veth pair, as with a routed CNI plugin. Everything is removed when the
//! testbed is dropped, also by a panic; what a killed run left is removed by the next.
//!
//! In a [`Cluster`] the pods are a real runtime's: the nodes have containerd and a kubelet, and a
//! CNI plugin of the caller's choice.

mod agent;
mod apiserver;
mod cgroup;
mod chain;
mod cluster;
mod containerd;
mod freeze;
mod host;
mod image;
mod kube_proxy;
mod kubernetes;
mod lease;
mod link;
mod manifest;
mod network;
mod plugin;
mod process;
mod random;
mod requirement;
mod scene;
mod sctp;
mod survey;
mod testbed;
mod wait;

pub use agent::{Agent, Said, Source, binary};
pub use apiserver::ApiServer;
pub use chain::Chain;
pub use cluster::Cluster;
pub use containerd::Cni;
pub use freeze::freeze;
pub use host::Host;
pub use kube_proxy::{KubeProxy, ProxyMode, ProxyProgram};
pub use kubernetes::KubernetesNode;
pub use lease::Lease;
pub use manifest::{PodObject, Service, Slice};
pub use plugin::{Container, Plugin, PluginError};
pub use process::Process;
pub use random::Random;
pub use requirement::{
    require_api_server, require_kernel, require_kube_proxy, require_kubelet, require_vlans,
};
pub use scene::{PROTOCOLS, Scene, all_answer, frontends, list, text};
pub use sctp::{Checksum, SctpEnd, SctpPacket, chunk};
pub use survey::{Answer, Findings, Question};
pub use testbed::{Node, Pod, Testbed, remove_leftovers};
pub use wait::{at_once, eventually, patiently};
