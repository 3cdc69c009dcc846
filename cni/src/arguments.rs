//! CNI_ARGS: whose container it is, as Kubernetes runtimes say it, and addresses asked for by hand.

use std::net::IpAddr;

use crate::{capability, error::Failure, state::Pod};

const VARIABLE: &str = "CNI_ARGS";

/// What CNI_ARGS says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID.
    pub pod: Option<Pod>,
    /// IP, separated by commas.
    pub ips: Vec<IpAddr>,
}

/// A name as Kubernetes allows it (RFC 1123, and upper case, which some runtimes let through).
fn is_kubernetes_name(name: &str, limit: usize) -> bool {
    !name.is_empty()
        && name.len() <= limit
        && name
            .bytes()
            .all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'.' | b'_'))
}

fn name(key: &str, value: &str, limit: usize) -> Result<String, Failure> {
    if is_kubernetes_name(value, limit) {
        return Ok(value.to_owned());
    }
    Err(Failure::environment(
        VARIABLE,
        format!(
            "says {key}={value:?}; it has to be 1 to {limit} letters, digits, dashes, dots and \
             underscores"
        ),
    ))
}

impl Arguments {
    /// Parses `KEY=value;KEY=value`.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let mut arguments = Self::default();
        let (mut namespace, mut pod, mut uid) = (None, None, None);
        let mut unknown = None;
        let mut ignores_unknown = false;
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                Failure::environment(
                    VARIABLE,
                    format!("has {pair:?}; write KEY=value, separated by semicolons"),
                )
            })?;
            match key {
                // An empty one says nothing: runtimes pass such for what they don't know.
                "K8S_POD_NAMESPACE" | "K8S_POD_NAME" | "K8S_POD_UID" if value.is_empty() => {}
                "K8S_POD_NAMESPACE" => namespace = Some(name(key, value, 63)?),
                "K8S_POD_NAME" => pod = Some(name(key, value, 253)?),
                "K8S_POD_UID" => uid = Some(name(key, value, 253)?),
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                "IP" => {
                    for part in value.split(',').filter(|part| !part.is_empty()) {
                        let reason = |reason| Failure::environment(VARIABLE, reason);
                        let ip = capability::address(part)
                            .map_err(|error| reason(format!("says IP={value:?}: {error}")))?;
                        arguments.ips.push(ip);
                    }
                }
                "IgnoreUnknown" => {
                    ignores_unknown = matches!(value, "1" | "true" | "True" | "TRUE" | "t" | "T");
                }
                other => unknown = unknown.or_else(|| Some(other.to_owned())),
            }
        }
        if let Some(unknown) = unknown.filter(|_| !ignores_unknown) {
            return Err(Failure::environment(
                VARIABLE,
                format!(
                    "has {unknown:?}, which is not known here; leave it out, or add IgnoreUnknown=1"
                ),
            ));
        }
        arguments.pod = match (namespace, pod) {
            (Some(namespace), Some(name)) => Some(Pod {
                namespace,
                name,
                uid,
            }),
            (None, None) => None,
            (None, Some(_)) => return Err(lacks("K8S_POD_NAMESPACE", "K8S_POD_NAME")),
            (Some(_), None) => return Err(lacks("K8S_POD_NAME", "K8S_POD_NAMESPACE")),
        };
        Ok(arguments)
    }
}

fn lacks(missing: &str, present: &str) -> Failure {
    Failure::environment(
        VARIABLE,
        format!("has {present} without {missing}; a pod has both"),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_runtimes_pass_is_understood() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;\
                    K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=11-22;FOO=bar=baz;IP=10.0.0.5/24,fd00::5";
        let arguments = Arguments::parse(text).unwrap();
        let pod = arguments.pod.unwrap();
        assert_eq!(
            (pod.namespace.as_str(), pod.name.as_str()),
            ("default", "web-0")
        );
        assert_eq!(pod.uid.as_deref(), Some("11-22"));
        assert_eq!(arguments.ips.len(), 2);
        assert_eq!(Arguments::parse("").unwrap(), Arguments::default());
    }

    #[test]
    fn errors_name_the_argument() {
        for (text, words) in [
            ("FOO=bar", "IgnoreUnknown=1"),
            ("FOO", "KEY=value"),
            ("K8S_POD_NAMESPACE=a b;K8S_POD_NAME=x", "K8S_POD_NAMESPACE"),
            ("K8S_POD_NAME=x", "without K8S_POD_NAMESPACE"),
            ("K8S_POD_NAMESPACE=x", "without K8S_POD_NAME"),
            ("IP=1.2.3", "IP="),
        ] {
            let error = Arguments::parse(text).unwrap_err();
            assert_eq!(error.code(), 4);
            assert!(error.to_string().starts_with("CNI_ARGS "), "{error}");
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }
}
