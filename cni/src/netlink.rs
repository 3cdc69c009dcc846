//! What is asked of the kernel, on one socket a namespace, one request a function. Here about links;
//! about what lies on them in [`address`].

mod address;

use std::os::fd::AsRawFd;

use futures::StreamExt;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
            LinkFlags, LinkInfo, LinkMessage,
        },
    },
};

pub use address::bits;

use crate::{error::Failure, netns::Netns, state::Mac};

const CREATE: u16 = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const EEXIST: i32 = nix::errno::Errno::EEXIST as i32;
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

    /// Asks for a list.
    pub(crate) async fn dump(
        &self,
        message: RouteNetlinkMessage,
        what: &str,
    ) -> Result<Vec<RouteNetlinkMessage>, Failure> {
        let answers = self.ask(message, NLM_F_DUMP).await;
        answers.map_err(|error| self.refused(error, what))
    }

    fn refused(&self, error: rtnetlink::Error, what: impl std::fmt::Display) -> Failure {
        Failure::kernel(format!("{what} {}", self.place))(error)
    }

    /// Makes a pair: `host` here, `container` in `netns` from the start. A link of `host`'s name
    /// gives way: what a killed ADD left, or what an attachment was before it changed.
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
        let message = RouteNetlinkMessage::NewLink(message);
        match self.ask(message.clone(), CREATE).await {
            // To ask first would make every ADD wait for the kernel's lock on all links once more.
            Err(rtnetlink::Error::NetlinkError(error))
                if error.raw_code() == -EEXIST && self.delete(host.name).await? =>
            {
                self.order(message, CREATE, what).await
            }
            result => result
                .map(drop)
                .map_err(|error| self.refused(error, what())),
        }
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
        let answers = self.dump(message, "listing links").await?;
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

    /// Asks for something to be made that this module does not know.
    pub(crate) async fn create(
        &self,
        message: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        self.order(message, CREATE, what).await
    }
}
