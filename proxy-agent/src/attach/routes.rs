//! Tells the programs that the kernel's routes or neighbours are others than before, which XDP does
//! not ask for with each packet.
//!
//! Driven by rtnetlink's groups. Where a message is missed, what the programs remember ends by itself
//! after two seconds.

use std::{collections::HashMap, io, net::IpAddr, time::Duration};

use futures::{FutureExt, StreamExt};
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage as Message,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};

use crate::dataplane::changed::Changed;

/// What a packet's way depends on. IPv4's routes go without a word when their interface goes down.
const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Nexthop,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];
/// How long to let messages gather after some were told of: routes come by the thousand.
const GATHER: Duration = Duration::from_millis(10);
/// How soon to listen again after the connection ended.
const RETRY: Duration = Duration::from_secs(1);
/// Of more neighbours than this nothing is remembered: each message is a change.
const NEIGHBOURS: usize = 65_536;

/// Listens for as long as the agent runs.
pub async fn watch(changed: Changed) {
    loop {
        if let Err(error) = listen(&changed).await {
            tracing::warn!("listening for routes and neighbours: {error}; trying again");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn listen(changed: &Changed) -> io::Result<()> {
    let (connection, _handle, mut messages) = new_multicast_connection(&GROUPS)?;
    let connection = tokio::spawn(connection);
    let mut known = Neighbours::default();
    changed.note();
    while let Some((message, _)) = messages.next().await {
        let mut is_change = known.hear(&message);
        while let Some(Some((message, _))) = messages.next().now_or_never() {
            is_change |= known.hear(&message);
        }
        if is_change {
            changed.note();
            tokio::time::sleep(GATHER).await;
        }
    }
    connection.abort();
    Err(io::Error::other("the netlink connection ended"))
}

/// An interface and an address there.
type Place = (u32, IpAddr);

/// Neighbours' Ethernet addresses, as last heard, and nothing for those that the kernel can't reach: most of what is told of neighbours is that they are
/// still there.
#[derive(Default)]
struct Neighbours(HashMap<Place, Vec<u8>>);

impl Neighbours {
    /// Whether a message says that packets may go another way than before.
    fn hear(&mut self, message: &NetlinkMessage<Message>) -> bool {
        match &message.payload {
            NetlinkPayload::InnerMessage(Message::NewNeighbour(neighbour)) => {
                self.set(neighbour, true)
            }
            NetlinkPayload::InnerMessage(Message::DelNeighbour(neighbour)) => {
                self.set(neighbour, false)
            }
            NetlinkPayload::InnerMessage(_) => true,
            _ => {
                // Some were lost.
                self.0.clear();
                true
            }
        }
    }

    /// Notes a neighbour; whether it is not as it was.
    fn set(&mut self, neighbour: &NeighbourMessage, is_there: bool) -> bool {
        let (mut ip, mut ethernet) = (None, Vec::new());
        for attribute in &neighbour.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    ip = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    ip = Some(IpAddr::V6(*v6));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => ethernet.clone_from(bytes),
                _ => {}
            }
        }
        let Some(ip) = ip else {
            // A bridge's, which forwards by it.
            return false;
        };
        if !is_usable(neighbour.header.state) {
            ethernet.clear();
        }
        let place = (neighbour.header.ifindex, ip);
        let before = if !is_there {
            ethernet.clear();
            self.0.remove(&place)
        } else if self.0.len() < NEIGHBOURS {
            self.0.insert(place, ethernet.clone())
        } else {
            self.0.remove(&place)
        };
        // Of those who were there before, nothing is known at first.
        before.as_ref() != Some(&ethernet)
    }
}

/// Whether the kernel sends to a neighbour in this state without a question (NUD_VALID in its
/// include/net/neighbour.h).
fn is_usable(state: NeighbourState) -> bool {
    use NeighbourState::{Delay, Noarp, Permanent, Probe, Reachable, Stale};
    matches!(state, Permanent | Noarp | Reachable | Probe | Stale | Delay)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn message(is_new: bool, state: NeighbourState, ethernet: u8) -> NetlinkMessage<Message> {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.ifindex = 2;
        neighbour.header.state = state;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(Ipv4Addr::new(192, 0, 2, 1))),
            NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, ethernet]),
        ];
        NetlinkMessage::from(if is_new {
            Message::NewNeighbour(neighbour)
        } else {
            Message::DelNeighbour(neighbour)
        })
    }

    #[test]
    fn a_neighbour_that_is_still_there_is_no_change() {
        use NeighbourState::{Delay, Failed, Incomplete, Probe, Reachable, Stale};
        let mut known = Neighbours::default();
        for (is_new, state, ethernet, is_change) in [
            (true, Incomplete, 0, true),
            (true, Failed, 0, false),
            (true, Reachable, 1, true),
            (true, Stale, 1, false),
            (true, Delay, 1, false),
            (true, Probe, 1, false),
            (true, Reachable, 1, false),
            (true, Reachable, 2, true),
            (true, Reachable, 1, true),
            (true, Failed, 1, true),
            (true, Reachable, 1, true),
            (false, Stale, 1, true),
            (true, Stale, 1, true),
        ] {
            let message = message(is_new, state, ethernet);
            assert_eq!(known.hear(&message), is_change, "{state:?} {ethernet}");
        }
    }
}
