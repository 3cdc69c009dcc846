//! The end-to-end tests on other Linux kernels: the real agent, the real programs, real packets.
//!
//! Debian's kernels boot under QEMU's emulation, so neither KVM nor a spare machine is needed, from
//! an initrd with this workspace's debug binaries and nothing that a kernel does not need. Emulation
//! is an order of magnitude slower than the machine, hence a choice of tests: each way into the
//! kernel once.

mod initrd;
mod machine;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};

use crate::{
    emulation::{self, KERNELS, Kernel},
    run::{cargo, in_root, root},
};

/// A file of `tests/tests` and the tests of it that are run.
type Group = (&'static str, &'static [&'static str]);

/// Sockets, packets, hairpin; UDP that moves (needs the pid of a socket's owner); turns (counted
/// atomically); XDP beside TC; VLANs, which not every kernel has; both refusals, errors about packets, traces, and agents that are replaced.
const TESTS: &[Group] = &[
    (
        "services",
        &[
            "pods_and_host_processes_reach_services_at_the_socket",
            "packets_that_no_socket_hook_saw_are_translated",
            "a_pod_reaches_itself_through_its_own_service",
        ],
    ),
    ("changes", &["udp_leaves_a_backend_that_is_removed"]),
    (
        "algorithms",
        &["turns_go_round_and_affinity_comes_before_them"],
    ),
    (
        "packets",
        &[
            "xdp::xdp_sends_what_tc_would_send_and_leaves_the_rest_alone",
            "xdp_overlay::xdp_makes_and_unwraps_the_tunnels_that_the_kernels_device_would",
            "overlay::what_comes_through_a_tunnel_goes_into_its_pod",
        ],
    ),
    ("external", &["tagged::clients_of_a_vlan_reach_node_ports"]),
    (
        "trouble",
        &[
            "what_nobody_serves_is_refused_at_once_or_dropped",
            "errors_about_translated_packets_reach_the_client",
            "the_programs_say_what_they_refuse_when_asked_to",
            "killing_the_agent_disturbs_nobody",
        ],
    ),
];

/// How many tests there are.
fn count(tests: &[Group]) -> usize {
    tests.iter().map(|(_, names)| names.len()).sum()
}

/// Runs the tests on the kernels named, or on all.
pub fn all(names: &[String], may_be_missing: bool) -> Result<()> {
    emulation::require_architecture()?;
    let kernels = chosen(names)?;
    let binaries = binaries()?;
    let mut failures = Vec::new();
    for kernel in kernels {
        let started = Instant::now();
        let image = match kernel.image() {
            Ok(image) => image,
            Err(error) if may_be_missing => {
                println!("{:7} NOT RUN: it can't be fetched: {error:#}", kernel.name);
                continue;
            }
            Err(error) => {
                return Err(error.context(format!("fetching Linux {}", kernel.name)));
            }
        };
        let initrd = initrd::build(&image, &binaries, TESTS)
            .with_context(|| format!("an initrd for {}", image.release))?;
        let failed = machine::run(kernel.name, &image, &initrd, TESTS)?;
        println!(
            "{:7} {}: {} of {} tests passed, {:.0} s",
            kernel.name,
            image.release,
            count(TESTS) - failed.len(),
            count(TESTS),
            started.elapsed().as_secs_f32()
        );
        failures.extend(
            failed
                .into_iter()
                .map(|test| format!("{}: {test}", kernel.name)),
        );
    }
    if failures.is_empty() {
        return Ok(());
    }
    bail!("failed on other kernels:\n{}", failures.join("\n"))
}

fn chosen(names: &[String]) -> Result<Vec<&'static Kernel>> {
    if names.is_empty() {
        return Ok(KERNELS.iter().collect());
    }
    names.iter().map(|name| Kernel::named(name)).collect()
}

/// What runs in the machine.
pub struct Binaries {
    /// The agent.
    agent: PathBuf,
    /// What the tests send.
    traffic: PathBuf,
    /// The end-to-end tests, as [`TESTS`] groups them.
    tests: Vec<(&'static str, PathBuf)>,
}

/// Builds what runs in the machine, with debug assertions.
fn binaries() -> Result<Binaries> {
    in_root(cargo("build").args(["--package", "penstock-agent"]).args([
        "--package",
        "penstock-testbed",
        "--bins",
    ]))?;
    let mut test = cargo("test");
    test.args(["--package", "penstock-testbed", "--no-run"]);
    for (group, _) in TESTS {
        test.args(["--test", group]);
    }
    let output = test
        .args(["--message-format", "json"])
        .current_dir(root())
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("building the end-to-end tests ended with {}", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut tests = Vec::new();
    for (group, _) in TESTS {
        let path = messages.lines().find_map(|line| executable(line, group));
        let path =
            path.with_context(|| format!("cargo did not say where the tests {group} are"))?;
        tests.push((*group, path));
    }
    let (_, first) = tests.first().context("there are no tests")?;
    let target = first
        .ancestors()
        .find(|folder| folder.ends_with("debug"))
        .context("the tests are in no debug folder")?;
    Ok(Binaries {
        agent: target.join("penstock"),
        traffic: target.join("penstock-traffic"),
        tests,
    })
}

/// The executable of the target `name`, if this message of cargo's is about it.
fn executable(message: &str, name: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let is_it = message.get("target")?.get("name")?.as_str()? == name;
    let executable = message.get("executable")?.as_str()?;
    is_it.then(|| PathBuf::from(executable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_executable_is_found_among_the_messages() {
        let message = r#"{"reason":"compiler-artifact","target":{"name":"services"},"executable":"/t/debug/deps/services-1"}"#;
        assert_eq!(
            executable(message, "services"),
            Some(PathBuf::from("/t/debug/deps/services-1"))
        );
        assert_eq!(executable(message, "scripts"), None);
        assert_eq!(executable(r#"{"executable":null}"#, "services"), None);
    }

    #[test]
    fn the_tests_that_are_run_exist() -> Result<()> {
        let folder = root().join("tests/tests");
        for (group, tests) in TESTS {
            for test in *tests {
                // A group is a file, or a folder of modules.
                let (file, function) = match test.split_once("::") {
                    Some((module, function)) => (format!("{group}/{module}.rs"), function),
                    None => (format!("{group}.rs"), *test),
                };
                let source = std::fs::read_to_string(folder.join(&file)).context(file)?;
                let function = format!("fn {function}()");
                assert!(source.contains(&function), "{group}: {test}");
            }
        }
        Ok(())
    }

    #[test]
    fn all_kernels_are_chosen_where_none_is_named() {
        assert!(chosen(&["2.4".to_owned()]).is_err());
        assert_eq!(chosen(&[]).map_or(0, |all| all.len()), KERNELS.len());
    }
}
