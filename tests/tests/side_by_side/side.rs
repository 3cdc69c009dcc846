//! One of the two nodes that are compared, with who may ask and who may serve.

use std::net::IpAddr;

use penstock_testbed::{Host, Node, Pod};

use crate::service::{Ranges, Role};

/// A node, and what is where as seen from it.
pub struct Side {
    pub name: &'static str,
    pub is_penstock: bool,
    pub node: Node,
    /// The node's other address of each family.
    pub second: [IpAddr; 2],
    /// Pods that serve.
    pub here: [Pod; 2],
    pub there: [Pod; 2],
    pub other: Node,
    /// Pods that only ask; packets of the second are what its node translates.
    pub guests: [Pod; 2],
    /// A pod of a third node.
    pub elsewhere: Pod,
    /// A host that is no node.
    pub outside: Host,
}

impl Side {
    /// Where a role is played.
    pub fn host(&self, role: Role) -> &Host {
        match role {
            Role::Here(number) => &self.here[number].host,
            Role::There(number) => &self.there[number].host,
            Role::HostHere => &self.node.host,
            Role::HostThere => &self.other.host,
        }
    }

    /// Who plays a role, by its name.
    pub fn role(&self, server: &str) -> Option<Role> {
        Role::ALL
            .into_iter()
            .find(|role| self.host(*role).name == server)
    }

    /// The name of a role's node.
    pub fn node_of(&self, role: Role) -> String {
        if role.is_here() {
            self.node.name()
        } else {
            self.other.name()
        }
    }

    /// Ranges of a load balancer's clients, each of one family.
    pub fn ranges(&self, ranges: Ranges) -> Vec<String> {
        match ranges {
            Ranges::Everybody => Vec::new(),
            Ranges::Client => vec![
                format!("{}/32", self.outside.ip4),
                format!("{}/128", self.outside.ip6),
            ],
            Ranges::Pods => vec!["10.244.0.0/16".to_owned(), "fd00:244::/32".to_owned()],
            Ranges::Nodes => vec!["172.31.0.0/24".to_owned(), "fd00:31::/64".to_owned()],
            Ranges::Nobody => vec!["192.0.2.0/24".to_owned(), "2001:db8:1::/48".to_owned()],
        }
    }
}
