//! EndpointSlices.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use super::{
    Decoded, HEADLESS, Interner, SERVICE_NAME, SERVICE_PROXY_NAME, TRIGGERED, WEIGHTS, check_name,
    cut, object_name,
    raw::{Endpoint as RawEndpoint, Hint, Raw},
    service::{port_number, protocol},
    usable_ip, weights,
};
use crate::model::object::{
    Endpoint, EndpointPort, EndpointSlice, Family, Kind, Object, ObjectName,
};

/// Decodes an EndpointSlice, or says why it can't be used.
pub(super) fn decode(raw: Raw, names: &mut Interner) -> Result<Decoded, String> {
    let name = object_name(&raw.metadata, Kind::EndpointSlice, names)?;
    let ignored = Ok(Decoded::Ignored(Kind::EndpointSlice, name.clone()));
    let labels = &raw.metadata.labels;
    if labels.contains_key(SERVICE_PROXY_NAME) || labels.contains_key(HEADLESS) {
        return ignored;
    }
    let Some(service) = raw.metadata.label(SERVICE_NAME) else {
        return ignored;
    };
    check_name("the label kubernetes.io/service-name", service)?;
    let family = match raw.address_type.as_deref() {
        Some("IPv4") => Family::V4,
        Some("IPv6") => Family::V6,
        Some("FQDN") => return ignored,
        other => {
            let shown = cut(other.unwrap_or_default());
            return Err(format!("addressType {shown:?} is none of IPv4, IPv6, FQDN"));
        }
    };
    let service = ObjectName {
        namespace: name.namespace.clone(),
        name: names.get(service),
    };
    let mut ports = Vec::with_capacity(raw.ports.len());
    for port in &raw.ports {
        // Without a number the port means all ports, which a service proxy can't use.
        let Some(number) = port.port else { continue };
        ports.push(EndpointPort {
            name: names.get(port.name.as_deref().unwrap_or_default()),
            protocol: protocol(port.protocol.as_deref())?,
            port: port_number(number)?,
        });
    }
    let weights = match raw.metadata.annotation(WEIGHTS) {
        Some(text) => weights::decode(text)?,
        None => HashMap::new(),
    };
    let endpoints: Result<Vec<Endpoint>, String> = raw
        .endpoints
        .iter()
        .enumerate()
        .map(|(number, raw)| {
            endpoint(raw, family, &weights, names)
                .map_err(|reason| format!("endpoint {number}: {reason}"))
        })
        .collect();
    let slice = EndpointSlice {
        name,
        service,
        family,
        ports,
        endpoints: endpoints?,
        triggered: raw.metadata.annotation(TRIGGERED).and_then(moment),
    };
    Ok(Decoded::Object(Object::EndpointSlice(slice)))
}

/// A time of RFC 3339 as time since 1970. One that can't be read costs a measurement and nothing else.
fn moment(text: &str) -> Option<Duration> {
    let time: jiff::Timestamp = text.parse().ok()?;
    time.as_duration().try_into().ok()
}

fn endpoint(
    raw: &RawEndpoint,
    family: Family,
    weights: &HashMap<IpAddr, u16>,
    names: &mut Interner,
) -> Result<Endpoint, String> {
    let text = raw.addresses.first().ok_or("has no address")?;
    let address: IpAddr = usable_ip("address", text)?;
    if Family::of(address) != family {
        return Err(format!(
            "address {address} is not of the slice's addressType"
        ));
    }
    let ready = raw.conditions.ready.unwrap_or(true);
    let terminating = raw.conditions.terminating.unwrap_or(false);
    let (for_zones, for_nodes) = match &raw.hints {
        Some(hints) => (
            hint_names(&hints.for_zones, names),
            hint_names(&hints.for_nodes, names),
        ),
        None => Default::default(),
    };
    Ok(Endpoint {
        address,
        ready,
        serving: raw.conditions.serving.unwrap_or(ready),
        terminating,
        weight: weights.get(&address).copied().unwrap_or(1),
        node: raw.node_name.as_deref().map(|name| names.get(name)),
        for_zones,
        for_nodes,
    })
}

fn hint_names(hints: &[Hint], names: &mut Interner) -> Box<[Arc<str>]> {
    hints.iter().map(|hint| names.get(&hint.name)).collect()
}
