//! Addresses, routes and neighbours: what lies on a link.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use rtnetlink::{
    AddressMessageBuilder, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    },
};

use super::{CREATE, Netlink};
use crate::{error::Failure, state::Mac};

/// How long the kernel may take to make an address a namespace's own, which is a matter of less
/// than a millisecond where there is a processor for it.
const OWNED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is asked.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A family's number for a request.
fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// The question how packets to an address are routed.
fn way(ip: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = bits(ip);
    message
        .attributes
        .push(RouteAttribute::Destination(ip.into()));
    RouteNetlinkMessage::GetRoute(message)
}

/// How many bits an address has.
pub fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

impl Netlink {
    /// Gives a link an address of its own, with nobody asked whether it is in use.
    pub async fn add_address(&self, index: u32, ip: IpAddr) -> Result<(), Failure> {
        let message = match ip {
            IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(ip, 32)
                .build(),
            IpAddr::V6(ip) => {
                let mut message = AddressMessageBuilder::<Ipv6Addr>::new()
                    .index(index)
                    .address(ip, 128)
                    .build();
                message
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
                message
            }
        };
        let what = || format!("adding the address {ip} to link {index}");
        self.order(RouteNetlinkMessage::NewAddress(message), CREATE, what)
            .await
    }

    /// A link's addresses with their prefix lengths.
    pub async fn addresses(&self, index: u32) -> Result<Vec<(IpAddr, u8)>, Failure> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump(message, "listing addresses").await?;
        let mut found = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewAddress(message) = answer else {
                continue;
            };
            if message.header.index != index {
                continue;
            }
            let address = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                });
            found.extend(address.map(|ip| (ip, message.header.prefix_len)));
        }
        Ok(found)
    }

    /// Routes one address to a link.
    pub async fn add_host_route(&self, index: u32, ip: IpAddr) -> Result<(), Failure> {
        let message = match ip {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, 32)
                .scope(RouteScope::Link)
                .output_interface(index)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, 128)
                .output_interface(index)
                .build(),
        };
        let what = || format!("routing {ip} to link {index}");
        self.order(RouteNetlinkMessage::NewRoute(message), CREATE, what)
            .await
    }

    /// Routes everything through a gateway on a link, wherever the gateway's address belongs.
    pub async fn add_default_route(&self, index: u32, gateway: IpAddr) -> Result<(), Failure> {
        let message = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .onlink()
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .onlink()
                .build(),
        };
        let what = || {
            format!(
                "adding the default route through {gateway} (a container has one; leave out the \
                 other plugin that makes it)"
            )
        };
        self.order(RouteNetlinkMessage::NewRoute(message), CREATE, what)
            .await
    }

    /// The gateways of a link's default routes.
    pub async fn default_gateways(&self, index: u32) -> Result<Vec<IpAddr>, Failure> {
        let message = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        let answers = self.dump(message, "listing routes").await?;
        let mut found = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewRoute(route) = answer else {
                continue;
            };
            let leaves = route.attributes.contains(&RouteAttribute::Oif(index));
            if route.header.destination_prefix_length != 0 || !leaves {
                continue;
            }
            found.extend(
                route
                    .attributes
                    .iter()
                    .filter_map(|attribute| match attribute {
                        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                        RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                        _ => None,
                    }),
            );
        }
        Ok(found)
    }

    /// The link that packets to `ip` leave by.
    pub async fn way_to(&self, ip: IpAddr) -> Result<Option<u32>, Failure> {
        // No way at all is answered by an error.
        let answers = self.ask(way(ip), 0).await.unwrap_or_default();
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Unicast => {
                route
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        RouteAttribute::Oif(index) => Some(*index),
                        _ => None,
                    })
            }
            _ => None,
        }))
    }

    /// Waits until packets to an address of this namespace's are its own. The kernel makes the route
    /// that says so a little after the IPv6 address (`addrconf_dad_completed`, in a work queue, also
    /// where nobody is asked); until then they would be routed on, and a container's first answers
    /// be lost.
    pub async fn owned(&self, ip: IpAddr) -> Result<(), Failure> {
        let started = Instant::now();
        while !self.owns(ip).await {
            if started.elapsed() > OWNED_WITHIN {
                return Err(Failure::TryAgain(format!(
                    "the kernel did not make {ip} an address {} within {} s",
                    self.place,
                    OWNED_WITHIN.as_secs()
                )));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    async fn owns(&self, ip: IpAddr) -> bool {
        let answers = self.ask(way(ip), 0).await.unwrap_or_default();
        answers.iter().any(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => route.header.kind == RouteType::Local,
            _ => false,
        })
    }

    /// Tells a link who has an address, for good: nobody is ever asked.
    pub async fn add_neighbour(&self, index: u32, ip: IpAddr, mac: Mac) -> Result<(), Failure> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(ip.into()),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let what = || format!("adding the neighbour {ip} to link {index}");
        self.order(RouteNetlinkMessage::NewNeighbour(message), flags, what)
            .await
    }

    /// A link's permanent neighbours.
    pub async fn neighbours(&self, index: u32) -> Result<Vec<(IpAddr, Mac)>, Failure> {
        let mut message = NeighbourMessage::default();
        // The kernel leaves other links out.
        message.attributes.push(NeighbourAttribute::IfIndex(index));
        let message = RouteNetlinkMessage::GetNeighbour(message);
        let answers = self.dump(message, "listing neighbours").await?;
        let mut found = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewNeighbour(message) = answer else {
                continue;
            };
            let header = message.header;
            if header.ifindex != index || header.state != NeighbourState::Permanent {
                continue;
            }
            let (mut ip, mut mac) = (None, None);
            for attribute in message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                        ip = Some(IpAddr::V4(found));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                        ip = Some(IpAddr::V6(found));
                    }
                    NeighbourAttribute::LinkLayerAddress(octets) => {
                        mac = octets.try_into().ok().map(Mac);
                    }
                    _ => {}
                }
            }
            found.extend(ip.zip(mac));
        }
        Ok(found)
    }
}
