//! Whether the kernel has what connects a pod, whatever the agent remembers of having put there: what
//! CHECK asks.

use std::net::IpAddr;

use aya::{
    Pod,
    maps::{HashMap, Map, MapError},
    programs::{SchedClassifier, TcAttachType},
};
use futures::TryStreamExt;
use penstock_cni::state::Attachment;
use penstock_common::{Be16, Endpoint, Frontend, FrontendKey, Proto, V4, V6};
use rtnetlink::{
    Handle,
    packet_route::tc::{TcAttribute, TcMessage},
};

use super::interface::{HANDLE, Role};
use crate::dataplane::pins::Pins;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// This is not there, or another one.
    Damage(String),
    /// The kernel does not say.
    Unknown(String),
}

/// Finds both hooks on a pod's interface.
pub async fn hooks(handle: &Handle, interface: &str, index: u32) -> Result<(), Finding> {
    for (program, direction) in Role::Pod.hooks().iter().copied() {
        if is_linked(interface, program, direction) {
            continue;
        }
        let has_filter = has_filter(handle, index, direction).await;
        let has_filter = has_filter.map_err(|error| {
            Finding::Unknown(format!("listing filters of {interface}: {error}"))
        })?;
        if !has_filter {
            return Err(Finding::Damage(format!(
                "the program {program} is not on the interface {interface}"
            )));
        }
    }
    Ok(())
}

/// Whether a TCX link has it there. Kernels without TCX say that none has.
fn is_linked(interface: &str, program: &str, direction: TcAttachType) -> bool {
    SchedClassifier::query_tcx(interface, direction).is_ok_and(|(_, programs)| {
        let mut names = programs.iter().filter_map(|found| found.name_as_str());
        names.any(|name| name == program)
    })
}

/// Whether our filter is among a clsact qdisc's.
async fn has_filter(
    handle: &Handle,
    index: u32,
    direction: TcAttachType,
) -> Result<bool, rtnetlink::Error> {
    let filters = handle.traffic_filter(index.cast_signed()).get();
    let filters = match direction {
        TcAttachType::Egress => filters.egress(),
        _ => filters.ingress(),
    };
    let is_ours = |filter: &TcMessage| {
        let kind = TcAttribute::Kind("bpf".to_owned());
        u32::from(filter.header.handle) == HANDLE && filter.attributes.contains(&kind)
    };
    let filters: Vec<TcMessage> = filters.execute().try_collect().await?;
    Ok(filters.iter().any(is_ours))
}

/// Finds what `ENDPOINTS` is to say of a pod's addresses.
pub fn endpoints(pins: &Pins, attachment: &Attachment, index: u32) -> Result<(), Finding> {
    for ip in &attachment.ips {
        let endpoint = match ip {
            IpAddr::V4(ip) => look_up::<V4, Endpoint>(pins, "ENDPOINTS4", V4::from(*ip))?,
            IpAddr::V6(ip) => look_up::<V6, Endpoint>(pins, "ENDPOINTS6", V6::from(*ip))?,
        };
        let damage = |what: &str| {
            Err(Finding::Damage(format!(
                "the map ENDPOINTS has {what} {ip}"
            )))
        };
        match endpoint {
            None => return damage("nothing of"),
            Some(found) if found.ifindex != index => return damage("another interface for"),
            Some(found)
                if (found.mac, found.host_mac) != (attachment.mac.0, attachment.host_mac.0) =>
            {
                return damage("other Ethernet addresses for");
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Finds a frontend.
pub fn frontend(pins: &Pins, ip: IpAddr, port: u16, protocol: Proto) -> Result<(), Finding> {
    let number = Be16::from_host(port);
    let found: Option<Frontend> = match ip {
        IpAddr::V4(ip) => look_up(
            pins,
            "FRONTENDS4",
            FrontendKey::new(V4::from(ip), number, protocol),
        )?,
        IpAddr::V6(ip) => look_up(
            pins,
            "FRONTENDS6",
            FrontendKey::new(V6::from(ip), number, protocol),
        )?,
    };
    match found {
        Some(frontend) if frontend.slots.count > 0 => Ok(()),
        _ => Err(Finding::Damage(format!(
            "the map FRONTENDS leads nobody from port {port} of {ip}"
        ))),
    }
}

fn look_up<K: Pod, V: Pod>(pins: &Pins, name: &'static str, key: K) -> Result<Option<V>, Finding> {
    let unknown = |error: &dyn std::fmt::Display| Finding::Unknown(format!("map {name}: {error}"));
    let map = pins.map(name).map_err(|error| unknown(&error))?;
    let map: HashMap<_, K, V> =
        HashMap::try_from(Map::HashMap(map)).map_err(|error| unknown(&error))?;
    match map.get(&key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(unknown(&error)),
    }
}
