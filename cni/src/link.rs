//! A container's interface: made, looked at, taken away.
//!
//! Neighbours are permanent and addresses are not probed, so neither end ever asks anybody
//! anything, and the interface works the moment it is there.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use crate::{
    error::Failure,
    names,
    netlink::{End, Link, Netlink, bits},
    netns::Netns,
    shape::Limit,
    state::Attachment,
};

/// Where containers send all IPv4 packets: an address that nobody has, whose Ethernet address is
/// the host end's.
pub const GATEWAY4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// The same for IPv6.
const GATEWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The gateway of an address' family.
pub fn gateway(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { GATEWAY4 } else { GATEWAY6 }
}

/// The address of its family that means any.
pub fn unspecified(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Both ends' sockets.
#[derive(Debug)]
pub struct Ends {
    host: Netlink,
    container: Netlink,
    netns: Netns,
}

impl Ends {
    /// Opens both.
    pub fn open(netns: Netns) -> Result<Self, Failure> {
        Ok(Self {
            host: Netlink::host()?,
            container: Netlink::container(&netns)?,
            netns,
        })
    }

    /// The host's.
    pub fn host(&self) -> &Netlink {
        &self.host
    }

    /// Where the container's namespace is.
    pub fn netns(&self) -> &Path {
        self.netns.path()
    }

    /// Makes the interface, and all that belongs to it.
    pub async fn make(
        &self,
        attachment: &Attachment,
        alias: &str,
        mtu: u32,
    ) -> Result<(), Failure> {
        let host = End {
            name: &attachment.interface,
            mac: attachment.host_mac,
        };
        let container = End {
            name: &attachment.key.ifname,
            mac: attachment.mac,
        };
        self.host
            .create_pair(host, container, &self.netns, mtu)
            .await?;
        let link = made(&self.host, &attachment.interface).await?;
        // First of all, so that it is known as ours.
        self.host.set_alias(link.index, alias).await?;
        self.host.mute_ipv6(link.index).await;
        self.host.set_up(link.index).await?;
        self.make_container(attachment).await?;
        for ip in &attachment.ips {
            // Before the route, which is what the host sends packets by.
            self.host
                .add_neighbour(link.index, *ip, attachment.mac)
                .await?;
            self.host.add_host_route(link.index, *ip).await?;
        }
        for ip in &attachment.ips {
            self.container.owned(*ip).await?;
        }
        let bandwidth = attachment.bandwidth.unwrap_or_default();
        match Limit::from_bits(bandwidth.ingress_rate, bandwidth.ingress_burst) {
            Some(limit) => limit.apply(&self.host, link.index).await,
            None => Ok(()),
        }
    }

    async fn make_container(&self, attachment: &Attachment) -> Result<(), Failure> {
        let link = made(&self.container, &attachment.key.ifname).await?;
        if attachment.ips.iter().any(IpAddr::is_ipv6) {
            self.netns.quiet_ipv6(&attachment.key.ifname)?;
        } else {
            // No address by which to ask for routers that are not there, and to tell groups of.
            self.container.mute_ipv6(link.index).await;
        }
        self.container.set_up(link.index).await?;
        for ip in &attachment.ips {
            let gateway = gateway(*ip);
            self.container.add_address(link.index, *ip).await?;
            self.container
                .add_neighbour(link.index, gateway, attachment.host_mac)
                .await?;
            self.container
                .add_default_route(link.index, gateway)
                .await?;
        }
        let bandwidth = attachment.bandwidth.unwrap_or_default();
        match Limit::from_bits(bandwidth.egress_rate, bandwidth.egress_burst) {
            Some(limit) => limit.apply(&self.container, link.index).await,
            None => Ok(()),
        }
    }

    /// Whether everything is as [`Self::make`] made it. Its MTU may differ: plugins later in a chain
    /// change it, and pods may.
    pub async fn verify(&self, attachment: &Attachment) -> Result<(), Failure> {
        let interface = &attachment.interface;
        let ifname = &attachment.key.ifname;
        let gone = |name: &str| Failure::Mismatch(format!("the interface {name} is gone"));
        let host = self.host.link(interface).await?;
        let host = host.ok_or_else(|| gone(interface))?;
        let container = self.container.link(ifname).await?;
        let container = container.ok_or_else(|| gone(ifname))?;
        for (link, mac) in [(&host, attachment.host_mac), (&container, attachment.mac)] {
            let name = &link.name;
            ensure(link.is_veth, || format!("{name} is no veth link"))?;
            ensure(link.is_up, || format!("{name} is down"))?;
            ensure(link.mac == Some(mac), || {
                let mac = link.mac.map(|mac| mac.to_string());
                format!(
                    "{name} has another Ethernet address, {}",
                    mac.unwrap_or_default()
                )
            })?;
        }
        let addresses = self.container.addresses(container.index).await?;
        let gateways = self.container.default_gateways(container.index).await?;
        let inside = self.container.neighbours(container.index).await?;
        let outside = self.host.neighbours(host.index).await?;
        for ip in &attachment.ips {
            let gateway = gateway(*ip);
            ensure(addresses.contains(&(*ip, bits(*ip))), || {
                format!("{ifname} does not have the address {ip}")
            })?;
            ensure(gateways.contains(&gateway), || {
                format!("{ifname} does not have the default route through {gateway}")
            })?;
            ensure(inside.contains(&(gateway, attachment.host_mac)), || {
                format!("{ifname} does not have the neighbour {gateway}")
            })?;
            ensure(outside.contains(&(*ip, attachment.mac)), || {
                format!("{interface} does not have the neighbour {ip}")
            })?;
            let way = self.host.way_to(*ip).await?;
            ensure(way == Some(host.index), || {
                format!("the host does not route {ip} to {interface}")
            })?;
        }
        let bandwidth = attachment.bandwidth.unwrap_or_default();
        for (rate, netlink, link) in [
            (bandwidth.ingress_rate, &self.host, &host),
            (bandwidth.egress_rate, &self.container, &container),
        ] {
            let is_so = rate == 0 || Limit::is_applied(netlink, link.index).await?;
            ensure(is_so, || {
                format!("{} is not limited to {rate} bits per second", link.name)
            })?;
        }
        Ok(())
    }
}

/// A link that was made a moment ago.
async fn made(netlink: &Netlink, name: &str) -> Result<Link, Failure> {
    netlink.link(name).await?.ok_or_else(|| {
        Failure::TryAgain(format!(
            "the interface {name} was removed while it was made; was the container ended meanwhile?"
        ))
    })
}

fn ensure(is_so: bool, otherwise: impl FnOnce() -> String) -> Result<(), Failure> {
    if is_so {
        Ok(())
    } else {
        Err(Failure::Mismatch(otherwise()))
    }
}

/// Takes an attachment's link away; that of a namespace that is gone is gone already.
pub async fn remove(
    host: &Netlink,
    attachment: &Attachment,
    netns: Option<&Netns>,
) -> Result<(), Failure> {
    if host.delete(&attachment.interface).await? {
        return Ok(());
    }
    // Ends go together, so this is for one that somebody renamed, or moved away.
    let Some(netns) = netns else { return Ok(()) };
    let container = Netlink::container(netns)?;
    let ifname = &attachment.key.ifname;
    match container.link(ifname).await? {
        Some(link) if link.is_veth && link.mac == Some(names::container_mac(&attachment.key)) => {
            container.delete(ifname).await.map(drop)
        }
        _ => Ok(()),
    }
}
