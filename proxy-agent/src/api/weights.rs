//! How much of a service's new connections each endpoint gets, as an annotation says it.

use std::{collections::HashMap, net::IpAddr};

use super::{WEIGHTS, cut, plain, unique, usable_ip};

/// Weights by address: a JSON object, or address=weight with commas between.
///
/// Addresses that the slice does not have are nobody's: endpoints come and go by other hands.
pub(super) fn decode(text: &str) -> Result<HashMap<IpAddr, u16>, String> {
    let wrong = |reason: String| format!("annotation {WEIGHTS}: {reason}");
    let pairs = pairs(text.trim()).map_err(wrong)?;
    let mut weights = HashMap::with_capacity(pairs.len());
    for (address, weight) in pairs {
        let ip = usable_ip("address", &address).map_err(wrong)?;
        let number = weight.parse::<u16>().map_err(|_| {
            let most = u16::MAX;
            wrong(format!(
                "the weight {:?} of {ip} is no whole number from 0 to {most}",
                cut(&weight)
            ))
        })?;
        if weights.insert(ip, number).is_some() {
            return Err(wrong(format!("{ip} is there twice")));
        }
    }
    Ok(weights)
}

/// Addresses and weights as they are written.
fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    if text.starts_with('{') {
        let mut json = serde_json::Deserializer::from_str(text);
        let value = unique::value(&mut json)
            .and_then(|value| json.end().map(|()| value))
            .map_err(|error| format!("can't be decoded: {}", plain(&error.to_string())))?;
        let entries = value.and_then(|value| value.as_object().cloned());
        let entries = entries.unwrap_or_default().into_iter();
        return Ok(entries
            .map(|(address, weight)| (address, weight.to_string()))
            .collect());
    }
    text.split(',')
        .map(str::trim)
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (address, weight) = pair.split_once('=').ok_or_else(|| {
                format!(
                    "{:?} is not address=weight, as in 10.244.0.5=3,10.244.0.6=1",
                    cut(pair)
                )
            })?;
            Ok((address.trim().to_owned(), weight.trim().to_owned()))
        })
        .collect()
}
