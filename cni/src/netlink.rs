//! What is asked of the kernel about links, addresses, routes and neighbours: one request a
//! function, on one socket a namespace.

use std::{net::IpAddr, os::fd::AsRawFd};

use futures::StreamExt;
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
        NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
            LinkFlags, LinkInfo, LinkMessage,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    },
};

use crate::{error::Failure, netns::Netns, state::Mac};

const CREATE: u16 = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const ENODEV: i32 = nix::errno::Errno::ENODEV as i32;

/// A socket to the kernel of one namespace.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    /// Which namespace, for errors.
    place: String,
}

/// A link as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// Its alias.
    pub alias: Option<String>,
    /// Whether it is a veth's end.
    pub is_veth: bool,
    /// Whether it is up.
    pub is_up: bool,
}

/// An end of a link that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its Ethernet address.
    pub mac: Mac,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            alias: None,
            is_veth: false,
            is_up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(octets) => link.mac = octets.try_into().ok().map(Mac),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::LinkInfo(parts) => {
                    link.is_veth = parts.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        link
    }
}

/// A family's number for a request.
fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// How many bits an address has.
pub fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn named(name: &str) -> LinkMessageBuilder<LinkUnspec> {
    LinkMessageBuilder::<LinkUnspec>::default().name(name)
}

impl Netlink {
    /// A socket in the plugin's own namespace. Needs the runtime that will drive it.
    pub fn host() -> Result<Self, Failure> {
        let connection = rtnetlink::new_connection();
        let connection = connection.map_err(Failure::io("opening a netlink socket on the host"))?;
        Ok(Self::drive(connection, "on the host".to_owned()))
    }

    /// A socket in a container's namespace.
    pub fn container(netns: &Netns) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Handle::current();
        let connection = netns.run(move || {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        })?;
        Ok(Self::drive(
            connection,
            format!("in {}", netns.path().display()),
        ))
    }

    fn drive<T>(
        (connection, handle, _): (impl Future<Output = ()> + Send + 'static, Handle, T),
        place: String,
    ) -> Self {
        tokio::spawn(connection);
        Self { handle, place }
    }

    /// Asks, and collects what is answered.
    async fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, rtnetlink::Error> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.clone().request(request)?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => found.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Asks for something to be done.
    async fn order(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let result = self.ask(message, flags).await;
        result
            .map(drop)
            .map_err(|error| self.refused(error, what()))
    }

    fn refused(&self, error: rtnetlink::Error, what: impl std::fmt::Display) -> Failure {
        Failure::kernel(format!("{what} {}", self.place))(error)
    }

    /// Makes a pair: `host` here, `container` in `netns` from the start.
    pub async fn create_pair(
        &self,
        host: End<'_>,
        container: End<'_>,
        netns: &Netns,
        mtu: u32,
    ) -> Result<(), Failure> {
        let peer = named(container.name)
            .address(container.mac.0.to_vec())
            .mtu(mtu)
            .setns_by_fd(netns.file().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(host.name)
            .address(host.mac.0.to_vec())
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let what = || {
            format!(
                "making the link {} to {} in {} (neither may be there already)",
                host.name,
                container.name,
                netns.path().display()
            )
        };
        self.order(RouteNetlinkMessage::NewLink(message), CREATE, what)
            .await
    }

    /// Names a link's owner.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<(), Failure> {
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::IfAlias(alias.to_owned()))
            .build();
        let what = || format!("setting the alias of link {index}");
        self.order(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, what)
            .await
    }

    /// Keeps a link without a link-local address, and thereby from speaking IPv6 by itself.
    pub async fn mute_ipv6(&self, index: u32) {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![mode],
            )]))
            .build();
        // Where it is refused the host has no IPv6, and there is nothing to mute.
        let _ = self
            .ask(RouteNetlinkMessage::SetLink(message), NLM_F_ACK)
            .await;
    }

    /// Sets a link up.
    pub async fn set_up(&self, index: u32) -> Result<(), Failure> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let what = || format!("setting link {index} up");
        self.order(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, what)
            .await
    }

    /// The link of that name, if there is one.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, Failure> {
        let message = RouteNetlinkMessage::GetLink(named(name).build());
        match self.ask(message, 0).await {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
                _ => None,
            })),
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -ENODEV => Ok(None),
            Err(error) => Err(self.refused(error, format_args!("looking for the link {name}"))),
        }
    }

    /// All links.
    pub async fn links(&self) -> Result<Vec<Link>, Failure> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.ask(message, NLM_F_DUMP).await;
        let answers = answers.map_err(|error| self.refused(error, "listing links"))?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
            _ => None,
        });
        Ok(links.collect())
    }

    /// Deletes a link; whether it was there.
    pub async fn delete(&self, name: &str) -> Result<bool, Failure> {
        let message = RouteNetlinkMessage::DelLink(named(name).build());
        match self.ask(message, NLM_F_ACK).await {
            Ok(_) => Ok(true),
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -ENODEV => Ok(false),
            Err(error) => Err(self.refused(error, format_args!("deleting the link {name}"))),
        }
    }

    /// Gives a link an address of its own, with nobody asked whether it is in use.
    pub async fn add_address(&self, index: u32, ip: IpAddr) -> Result<(), Failure> {
        let message = match ip {
            IpAddr::V4(ip) => AddressMessageBuilder::<std::net::Ipv4Addr>::new()
                .index(index)
                .address(ip, 32)
                .build(),
            IpAddr::V6(ip) => {
                let mut message = AddressMessageBuilder::<std::net::Ipv6Addr>::new()
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
        let answers = self.ask(message, NLM_F_DUMP).await;
        let answers = answers.map_err(|error| self.refused(error, "listing addresses"))?;
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
            IpAddr::V4(ip) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(ip, 32)
                .scope(RouteScope::Link)
                .output_interface(index)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
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
            IpAddr::V4(gateway) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .onlink()
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
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
        let answers = self
            .ask(
                RouteNetlinkMessage::GetRoute(RouteMessage::default()),
                NLM_F_DUMP,
            )
            .await
            .map_err(|error| self.refused(error, "listing routes"))?;
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
        let mut message = RouteMessage::default();
        message.header.address_family = family(ip);
        message.header.destination_prefix_length = bits(ip);
        message
            .attributes
            .push(RouteAttribute::Destination(ip.into()));
        // No way at all is answered by an error.
        let answers = self
            .ask(RouteNetlinkMessage::GetRoute(message), 0)
            .await
            .unwrap_or_default();
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
        let answers = self
            .ask(RouteNetlinkMessage::GetNeighbour(message), NLM_F_DUMP)
            .await
            .map_err(|error| self.refused(error, "listing neighbours"))?;
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

    /// Sends a request that this file does not know.
    pub(crate) async fn create(
        &self,
        message: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        self.order(message, CREATE, what).await
    }
}
