//! Which of a kernel's modules have to be loaded for those that are wanted, and in which order. What a
//! module depends on is in its own `.modinfo`, so no index of Debian's or depmod's is needed.

use std::collections::BTreeSet;

use anyhow::Result;

/// The modules that are wanted and all that they depend on, each after what it needs. `depends` tells
/// what a module depends on, or that it is no file: then it is built in.
pub fn order(
    wanted: &[&str],
    mut depends: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Vec<String>> {
    enum Step {
        Look(String),
        Load(String),
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    let mut steps: Vec<Step> = wanted
        .iter()
        .rev()
        .map(|name| Step::Look((*name).to_owned()))
        .collect();
    while let Some(step) = steps.pop() {
        match step {
            Step::Load(name) => order.push(name),
            Step::Look(name) => {
                if !seen.insert(name.clone()) {
                    continue;
                }
                if let Some(needed) = depends(&name)? {
                    steps.push(Step::Load(name));
                    steps.extend(needed.into_iter().map(Step::Look));
                }
            }
        }
    }
    Ok(order)
}

/// What a module says that it depends on.
pub fn depends(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let start = module
        .windows(FIELD.len())
        .position(|window| window == FIELD);
    let names = start.and_then(|start| {
        let rest = module.get(start + FIELD.len()..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(rest.get(..end)?).ok()
    });
    names
        .unwrap_or_default()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(canonical)
        .collect()
}

/// The file among a kernel's that is the module `name`, compressed or not.
pub fn find<'a>(files: &'a [String], name: &str) -> Option<&'a str> {
    let is_it = |file: &&String| {
        let file = file.rsplit('/').next().unwrap_or_default();
        let stem = file.strip_suffix(".xz").unwrap_or(file);
        stem.strip_suffix(".ko")
            .is_some_and(|stem| canonical(stem) == name)
    };
    files.iter().find(is_it).map(String::as_str)
}

/// The kernel takes both signs for one; files have either.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(wanted: &[&str], known: &[(&str, &[&str])]) -> Vec<String> {
        order(wanted, |name| {
            let found = known.iter().find(|(known, _)| *known == name);
            Ok(found.map(|(_, needed)| needed.iter().map(|name| (*name).to_owned()).collect()))
        })
        .unwrap()
    }

    #[test]
    fn modules_come_once_and_after_what_they_need() {
        let known: &[(&str, &[&str])] = &[
            ("ip_vs_rr", &["ip_vs"]),
            ("ip_vs", &["nf_conntrack", "libcrc32c"]),
            ("nf_nat", &["nf_conntrack", "libcrc32c"]),
            ("nf_conntrack", &["libcrc32c"]),
            ("libcrc32c", &["crc32c"]),
        ];
        let order = ordered(&["ip_vs_rr", "nf_nat", "ip_vs", "veth"], known);
        let at = |name: &str| order.iter().position(|other| other == name).unwrap();
        for (name, needed) in known {
            for other in needed.iter().filter(|name| **name != "crc32c") {
                assert!(at(other) < at(name), "{order:?}");
            }
        }
        // What is no file is built in.
        assert_eq!(order.len(), known.len());
    }

    #[test]
    fn what_a_module_depends_on_is_in_its_own_words() {
        let module =
            b"\x7fELF\0license=GPL\0softdep=pre: crc32c\0depends=nf-nat,x_tables\0retpoline=Y\0";
        assert_eq!(depends(module), ["nf_nat", "x_tables"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"no module").is_empty());
    }

    #[test]
    fn modules_are_found_by_their_whole_name() {
        let files = [
            "kernel/drivers/net/mstp.ko",
            "kernel/net/802/stp.ko.xz",
            "kernel/drivers/char/hw_random/virtio-rng.ko.xz",
        ]
        .map(str::to_owned);
        assert_eq!(find(&files, "stp"), Some("kernel/net/802/stp.ko.xz"));
        assert!(find(&files, "virtio_rng").is_some());
        assert_eq!(find(&files, "tp"), None);
    }
}
