//! The overlay device, this node's addresses on it, and routes, by rtnetlink.
//!
//! Everything is compared with what is there, so that a second look changes nothing; what others
//! made is left alone. Our routes carry a protocol number of their own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
};

use futures::TryStreamExt;
use ipnetwork::IpNetwork;
use penstock_common::OVERLAY_MAC;
use rtnetlink::{
    Handle, LinkUnspec, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, CacheInfo},
        link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

use super::plan::{Hop, Remote};

/// The overlay device.
pub const DEVICE: &str = "penstock0";
/// Who made a route, as `ip route` shows it; numbers from 128 on are nobody's in rtnetlink.h.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(180);
/// Behind every other route: only for what no pod of this node has.
const LAST: u32 = 0x7fff_0000;

/// The kernel refused something.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct KernelError {
    /// What was asked.
    what: String,
    /// Why not.
    #[source]
    source: rtnetlink::Error,
}

impl KernelError {
    /// There is no talking to it at all.
    pub(super) fn connecting(error: io::Error) -> Self {
        failed("opening rtnetlink")(rtnetlink::Error::NamespaceError(error.to_string()))
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> KernelError {
    let what = what.into();
    move |source| KernelError { what, source }
}

/// An interface of this node.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it carries at most.
    pub mtu: u32,
    /// Its addresses with their networks, without link-local ones.
    pub networks: Vec<IpNetwork>,
}

/// All interfaces but the loopback.
pub async fn links(handle: &Handle) -> Result<Vec<Link>, KernelError> {
    let mut links: BTreeMap<u32, Link> = BTreeMap::new();
    let mut messages = handle.link().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(failed("listing interfaces"))?
    {
        if message.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let mut link = Link {
            index: message.header.index,
            ..Link::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                _ => {}
            }
        }
        links.insert(link.index, link);
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses
        .try_next()
        .await
        .map_err(failed("listing addresses"))?
    {
        let Some(link) = links.get_mut(&message.header.index) else {
            continue;
        };
        // IFA_LOCAL is this end's own address, also of point-to-point interfaces.
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let any = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        if let Some(ip) = local.or(any)
            && !is_link_local(ip)
            && let Ok(network) = IpNetwork::new(ip, message.header.prefix_len)
        {
            link.networks.push(network);
        }
    }
    Ok(links.into_values().collect())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// What the overlay device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// What it carries at most.
    pub mtu: u32,
    /// The UDP port of its tunnels.
    pub port: u16,
}

/// Makes the overlay device what it is to be; its index.
pub async fn overlay(handle: &Handle, wanted: Overlay) -> Result<u32, KernelError> {
    if let Some((index, is_right)) = existing(handle, wanted).await? {
        if is_right {
            set_up(handle, index, wanted).await?;
            return Ok(index);
        }
        tracing::info!("{DEVICE} is not what it is to be; making it anew");
        handle
            .link()
            .del(index)
            .execute()
            .await
            .map_err(failed(format!("removing {DEVICE}")))?;
    }
    let message = LinkMessageBuilder::new(DEVICE)
        .append_info_data(InfoVxlan::CollectMetadata(true))
        .port(wanted.port)
        .learning(false)
        .udp_zero_csum6_rx(true)
        .arp(false)
        .multicast(false)
        .address(OVERLAY_MAC.to_vec())
        .mtu(wanted.mtu)
        .build();
    handle
        .link()
        .add(message)
        .execute()
        .await
        .map_err(failed(format!(
            "making the VXLAN device {DEVICE} at UDP port {} (is another tunnel there? see `ip -d \
             link show type vxlan`, and --vxlan-port)",
            wanted.port
        )))?;
    // No link-local address: it would only be announced to nobody.
    let _ = fs::write(
        format!("/proc/sys/net/ipv6/conf/{DEVICE}/addr_gen_mode"),
        "1",
    );
    match existing(handle, wanted).await? {
        Some((index, _)) => {
            set_up(handle, index, wanted).await?;
            Ok(index)
        }
        None => Err(failed(format!("finding {DEVICE}"))(
            rtnetlink::Error::RequestFailed,
        )),
    }
}

type LinkMessageBuilder = rtnetlink::LinkMessageBuilder<LinkVxlan>;

async fn set_up(handle: &Handle, index: u32, wanted: Overlay) -> Result<(), KernelError> {
    let message = LinkUnspec::new_with_index(index)
        .mtu(wanted.mtu)
        .up()
        .build();
    handle
        .link()
        .set(message)
        .execute()
        .await
        .map_err(failed(format!("switching {DEVICE} on")))
}

/// Takes our routes and the overlay device away; how many routes there were, and whether it was there.
pub async fn remove(handle: &Handle) -> Result<(usize, bool), KernelError> {
    // Those into the device go with it, so they come first: to be counted, and whatever becomes of it.
    let routes = routes(handle, 0, &BTreeMap::new()).await?;
    // Whose device it is its Ethernet address says, whatever its port.
    let Some((index, mac)) = device(handle).await?.map(|message| {
        let mac = message.attributes.iter().find_map(|a| match a {
            LinkAttribute::Address(mac) => Some(mac.clone()),
            _ => None,
        });
        (message.header.index, mac)
    }) else {
        return Ok((routes, false));
    };
    if mac.as_deref() != Some(&OVERLAY_MAC[..]) {
        return Ok((routes, false));
    }
    let removed = handle.link().del(index).execute().await;
    removed.map_err(failed(format!("removing {DEVICE}")))?;
    Ok((routes, true))
}

/// The overlay device as the kernel describes it.
async fn device(handle: &Handle) -> Result<Option<LinkMessage>, KernelError> {
    let mut links = handle.link().get().match_name(DEVICE.to_owned()).execute();
    match links.try_next().await {
        Ok(message) => Ok(message),
        // Not there (ENODEV).
        Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
        Err(error) => Err(failed(format!("looking for {DEVICE}"))(error)),
    }
}

/// The overlay device's index, and whether it can stay.
async fn existing(handle: &Handle, wanted: Overlay) -> Result<Option<(u32, bool)>, KernelError> {
    let Some(message) = device(handle).await? else {
        return Ok(None);
    };
    let mut is_ours = [false; 3];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => is_ours[0] = *mac == OVERLAY_MAC,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
                        continue;
                    };
                    is_ours[1] = data.contains(&InfoVxlan::CollectMetadata(true));
                    is_ours[2] = data.contains(&InfoVxlan::Port(wanted.port));
                }
            }
            _ => {}
        }
    }
    Ok(Some((message.header.index, is_ours == [true; 3])))
}

/// Gives the overlay device exactly these addresses, each alone in its network.
pub async fn addresses(handle: &Handle, index: u32, wanted: &[IpAddr]) -> Result<(), KernelError> {
    let what = || format!("setting the addresses of {DEVICE}");
    let mut present = BTreeSet::new();
    let mut messages = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(message) = messages.try_next().await.map_err(failed(what()))? {
        let ip = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        match ip {
            Some(ip) if wanted.contains(&ip) => {
                present.insert(ip);
            }
            Some(_) => handle
                .address()
                .del(message)
                .execute()
                .await
                .map_err(failed(what()))?,
            None => {}
        }
    }
    for ip in wanted.iter().filter(|ip| !present.contains(ip)) {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let mut request = handle.address().add(index, *ip, bits);
        let message = request.message_mut();
        // No duplicate address detection: nobody else is on this link.
        message.header.flags |= AddressHeaderFlags::Nodad;
        if ip.is_ipv6() {
            // Only for what the overlay's routes name it as the source of. Towards the node's own
            // pods, whose addresses it resembles most (RFC 6724, 5, rule 8), it would be chosen
            // before the address that a pod has asked.
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_preferred = 0;
            lifetime.ifa_valid = u32::MAX;
            message
                .attributes
                .push(AddressAttribute::CacheInfo(lifetime));
        }
        request
            .execute()
            .await
            .map_err(failed(format!("giving {DEVICE} the address {ip}")))?;
    }
    Ok(())
}

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Into the overlay, as this address.
    Overlay(IpAddr),
    /// By way of a neighbour.
    Via(IpAddr),
    /// To nobody: an address of this node's range that no pod has.
    Nobody,
}

/// The routes that a plan's ranges need; `own` are this node's addresses in the overlay.
pub fn wanted(
    own: &[(IpNetwork, IpAddr)],
    remote: &BTreeMap<IpNetwork, Remote>,
) -> BTreeMap<IpNetwork, Target> {
    let mut routes = BTreeMap::new();
    for (range, _) in own {
        routes.insert(*range, Target::Nobody);
    }
    for (range, remote) in remote {
        let source = own
            .iter()
            .find(|(own, _)| own.is_ipv4() == range.is_ipv4())
            .map(|(_, ip)| *ip);
        let target = match (&remote.hop, source) {
            (Hop::Via(ip), _) => Target::Via(*ip),
            (Hop::Tunnel(_), Some(source)) => Target::Overlay(source),
            // Without an address of the family this node has nothing to send.
            (Hop::Tunnel(_), None) => continue,
        };
        routes.insert(*range, target);
    }
    routes
}

/// Makes our routes these; how many were changed.
pub async fn routes(
    handle: &Handle,
    overlay: u32,
    wanted: &BTreeMap<IpNetwork, Target>,
) -> Result<usize, KernelError> {
    let mut present: BTreeMap<IpNetwork, (Target, RouteMessage)> = BTreeMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        let mut messages = handle.route().get(filter).execute();
        while let Some(message) = messages
            .try_next()
            .await
            .map_err(failed("listing routes"))?
        {
            if message.header.protocol == PROTOCOL
                && let Some((range, target)) = read(&message)
            {
                present.insert(range, (target, message));
            }
        }
    }
    let mut changed = 0;
    for (range, (target, message)) in &present {
        if wanted.get(range) != Some(target) {
            let result = handle.route().del(message.clone()).execute().await;
            result.map_err(failed(format!("removing the route to {range}")))?;
            changed += 1;
        }
    }
    for (range, target) in wanted {
        if present.get(range).map(|(target, _)| target) == Some(target) {
            continue;
        }
        let Some(message) = route(*range, *target, overlay) else {
            continue;
        };
        let result = handle.route().add(message).replace().execute().await;
        result.map_err(failed(format!("making the route to {range}")))?;
        changed += 1;
    }
    Ok(changed)
}

/// The kernel's words for a route; `None` where its parts are of two families.
fn route(range: IpNetwork, target: Target, overlay: u32) -> Option<RouteMessage> {
    let builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(range.network(), range.prefix())
        .ok()?
        .protocol(PROTOCOL);
    Some(match target {
        Target::Overlay(source) => builder
            .output_interface(overlay)
            .scope(RouteScope::Link)
            .pref_source(source)
            .ok()?
            .build(),
        Target::Via(ip) => builder.gateway(ip).ok()?.build(),
        Target::Nobody => builder.kind(RouteType::Unreachable).priority(LAST).build(),
    })
}

/// Where one of our routes leads.
fn read(message: &RouteMessage) -> Option<(IpNetwork, Target)> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let (mut to, mut gateway, mut source) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => to = address(ip),
            RouteAttribute::Gateway(ip) => gateway = address(ip),
            RouteAttribute::PrefSource(ip) => source = address(ip),
            _ => {}
        }
    }
    let range = IpNetwork::new(to?, message.header.destination_prefix_length).ok()?;
    let target = if message.header.kind == RouteType::Unreachable {
        Target::Nobody
    } else if let Some(ip) = gateway {
        Target::Via(ip)
    } else {
        Target::Overlay(source?)
    };
    Some((range, target))
}

/// Lets the kernel forward, as a router of pods must.
pub fn allow_forwarding(families: impl Iterator<Item = bool>) -> io::Result<()> {
    for is_v4 in families {
        if is_v4 {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            // For packets that the hooks hand the kernel to split, this node's address on them.
            let accept = format!("/proc/sys/net/ipv4/conf/{DEVICE}/accept_local");
            fs::write(accept, "1")?;
            continue;
        }
        // A router ignores router advertisements, from which this node may have its own route.
        for entry in fs::read_dir("/proc/sys/net/ipv6/conf")?.flatten() {
            let path = entry.path().join("accept_ra");
            if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1") {
                // An interface that is gone meanwhile needs none.
                let _ = fs::write(path, "2");
            }
        }
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}
