//! The rules of kube-proxy's iptables mode as versions from 1.22 on have them, made of an earlier one's own.
//!
//! These have two rules for each port of a service in the chains that every new connection walks through: one that
//! marks what has to be masqueraded, and the jump to the service's own chain. Later ones have the first in that chain
//! (kubernetes#96959). Nothing else is changed, so that this alone is what makes the difference.

use std::{net::IpAddr, path::Path};

use anyhow::{Context, Result, ensure};
use penstock_testbed::Node;

use super::program::Program;

/// The first minor version whose rules are such.
const SINCE: u32 = 22;
/// The chains that every new connection walks through.
const WALKED: [&str; 2] = ["-A KUBE-SERVICES ", "-A KUBE-NODEPORTS "];
const MARK: &str = " -j KUBE-MARK-MASQ";
const JUMP: &str = " -j KUBE-SVC-";

/// Why there is nothing to be made of this kube-proxy's rules, if there is not.
pub fn missing(kube_proxy: Option<&Program>) -> Option<String> {
    let version = kube_proxy.filter(|program| program.proxy.minor() >= SINCE);
    version.map(|program| format!("the rules of {} are such already", program.proxy.version))
}

/// What an earlier version has written, as later ones do.
pub fn rewritten(rules: &str) -> Result<String> {
    let mut lines = rules.lines().peekable();
    let mut text = String::with_capacity(rules.len());
    let mut moved = 0;
    while let Some(line) = lines.next() {
        let chain = WALKED.iter().find(|chain| line.starts_with(**chain));
        let marking = chain.and_then(|chain| line.strip_prefix(chain)?.strip_suffix(MARK));
        // The jump of the same port is the next rule.
        let jump = lines.peek().and_then(|next| next.split_once(JUMP));
        match marking.zip(jump) {
            Some((marking, (_, service))) => {
                moved += 1;
                // Before all that the chain has, wherever that is written.
                text.push_str(&format!("-I KUBE-SVC-{service} 1 {marking}{MARK}"));
            }
            None => text.push_str(line),
        }
        text.push('\n');
    }
    ensure!(moved > 0, "these rules have nothing to be moved");
    Ok(text)
}

/// The same rules for an endpoint elsewhere.
pub fn redirected(rules: &str, from: IpAddr, to: IpAddr) -> String {
    let moved = |word: &str| {
        let rest = word.strip_prefix(&from.to_string())?;
        // With its port, or as a range of one.
        rest.starts_with([':', '/']).then(|| format!("{to}{rest}"))
    };
    let line = |line: &str| {
        let words = line.split(' ');
        let words = words.map(|word| moved(word).unwrap_or_else(|| word.to_owned()));
        words.collect::<Vec<_>>().join(" ") + "\n"
    };
    rules.lines().map(line).collect()
}

/// Loads rules on a node; `folder` is for the file.
pub fn load(rules: &str, node: &Node, folder: &Path) -> Result<()> {
    let path = folder.join(format!("{}.rules", node.name()));
    std::fs::write(&path, rules).with_context(|| format!("writing {}", path.display()))?;
    let path = path.to_str().context("a folder's name is no text")?;
    node.host.run("iptables-restore", &[path]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-AAAA - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/s2:tcp\" -m tcp --dport 30002 -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/s2:tcp\" -m tcp --dport 30002 -j KUBE-SVC-AAAA
-A KUBE-SEP-X -s 10.244.1.2/32 -m comment --comment \"default/s2:tcp\" -j KUBE-MARK-MASQ
-A KUBE-SEP-X -p tcp -m tcp -j DNAT --to-destination 10.244.1.2:8080
-A KUBE-SERVICES ! -s 10.244.0.0/16 -d 10.96.1.2/32 -p tcp -m comment --comment \"default/s2:tcp cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 10.96.1.2/32 -p tcp -m comment --comment \"default/s2:tcp cluster IP\" -m tcp --dport 80 -j KUBE-SVC-AAAA
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-AAAA -m comment --comment \"default/s2:tcp\" -j KUBE-SEP-X
COMMIT
";

    #[test]
    fn what_is_walked_through_is_half_as_long_and_nothing_is_lost() {
        let text = rewritten(RULES).unwrap();
        let walked = |text: &str| {
            let is_walked = |line: &&str| WALKED.iter().any(|chain| line.starts_with(chain));
            text.lines().filter(is_walked).count()
        };
        assert_eq!((walked(RULES), walked(&text)), (5, 3));
        for rule in [
            "-I KUBE-SVC-AAAA 1 ! -s 10.244.0.0/16 -d 10.96.1.2/32 -p tcp -m comment --comment \
             \"default/s2:tcp cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ",
            "-I KUBE-SVC-AAAA 1 -p tcp -m comment --comment \"default/s2:tcp\" -m tcp --dport 30002 \
             -j KUBE-MARK-MASQ",
        ] {
            assert!(text.lines().any(|line| line == rule), "{rule}: {text}");
        }
        assert_eq!(text.lines().count(), RULES.lines().count());
        // What marks endpoints of their own is where it was, and later versions' rules are left alone.
        assert!(text.contains("-A KUBE-SEP-X -s 10.244.1.2/32"));
        assert!(rewritten(&text).is_err());
    }

    #[test]
    fn rules_for_another_endpoint_name_no_other() {
        let [from, to] = ["10.244.1.2", "10.244.7.9"].map(|ip| ip.parse().unwrap());
        let text = redirected(&RULES.replace("10.96.1.2", "10.244.1.20"), from, to);
        assert!(
            text.contains("-s 10.244.7.9/32") && text.contains("10.244.7.9:8080"),
            "{text}"
        );
        assert!(
            text.contains("-d 10.244.1.20/32") && !text.contains("10.244.1.2/32"),
            "{text}"
        );
        assert_eq!(redirected(RULES, to, from), RULES);
    }
}
