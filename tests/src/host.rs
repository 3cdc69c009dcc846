//! Somewhere that processes run: a node, a pod or an outside client.

use std::{
    ffi::OsStr,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{self, Place, Process};

/// A network namespace with addresses, and a cgroup for its processes.
#[derive(Clone, Debug)]
pub struct Host {
    /// The namespace's name.
    pub name: String,
    /// Its IPv4 address.
    pub ip4: IpAddr,
    /// Its IPv6 address.
    pub ip6: IpAddr,
    pub(crate) place: Place,
}

/// The program that serves and asks, built with this crate.
fn traffic() -> Result<PathBuf> {
    crate::agent::binary("penstock-traffic")
}

impl Host {
    /// The same place, with processes in a cgroup that no socket hook is on.
    #[must_use]
    pub fn without_socket_hooks(&self) -> Self {
        let mut host = self.clone();
        host.place.cgroups.clear();
        host
    }

    /// Runs a program to its end; what it printed.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = process::command(program, &self.place)?;
        command.args(arguments);
        process::run(command)
    }

    /// Starts a program whose output is read line by line.
    pub fn start(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<Process> {
        let mut command = process::command(program, &self.place)?;
        command.args(arguments);
        Process::start(command)
    }

    /// Starts a program that writes to a file.
    pub fn start_logging(
        &self,
        program: impl AsRef<OsStr>,
        arguments: &[&str],
        log: &Path,
    ) -> Result<Process> {
        let mut command = process::command(program, &self.place)?;
        command.args(arguments);
        Process::start_logging(command, log)
    }

    /// Starts the traffic program, which says "ready" first where it serves.
    pub fn traffic(&self, arguments: &[&str]) -> Result<Process> {
        self.start(traffic()?, arguments)
    }

    /// Has the kernel track all connections that it sees here, as it does where a rule asks for their state.
    pub fn track_everything(&self) -> Result<()> {
        for iptables in ["iptables", "ip6tables"] {
            let rule = ["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"];
            self.run(iptables, &[&rule[..], &["-j", "ACCEPT"]].concat())?;
        }
        Ok(())
    }

    /// What the kernel tracks here (nf_conntrack), an entry each.
    pub fn tracked(&self) -> Result<Vec<String>> {
        let text = self.run("cat", &["/proc/thread-self/net/nf_conntrack"])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Segments and datagrams that it dropped for a wrong checksum.
    pub fn checksum_errors(&self) -> Result<u64> {
        let text = self.run("cat", &["/proc/thread-self/net/snmp"])?;
        let mut errors = 0;
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.chunks(2) {
            let [names, values] = pair else { continue };
            let columns = names.split(' ').zip(values.split(' '));
            errors += columns
                .filter(|(name, _)| *name == "InCsumErrors")
                .filter_map(|(_, value)| value.parse::<u64>().ok())
                .sum::<u64>();
        }
        // TCP's are those of both families there, UDP's are not.
        let text = self.run("cat", &["/proc/thread-self/net/snmp6"])?;
        let count = text
            .lines()
            .find_map(|line| line.strip_prefix("Udp6InCsumErrors"))
            .and_then(|count| count.trim().parse::<u64>().ok());
        Ok(errors + count.context("snmp6 counts UDP's checksum errors")?)
    }

    /// Switches checksum offload of an interface off, so that every checksum is really computed.
    pub fn without_checksum_offload(&self, interface: &str) -> Result<()> {
        self.run("ethtool", &["-K", interface, "tx", "off"])
            .map(drop)
    }

    /// Serves TCP and UDP on `port` of all addresses: each answer names this host, who asked, and
    /// the address that was reached.
    pub fn serve(&self, port: u16) -> Result<Process> {
        self.start_serving(port, &[])
    }

    /// The same, on one processor.
    pub fn serve_on(&self, port: u16, cpu: usize) -> Result<Process> {
        self.start_serving(port, &["--cpu", &cpu.to_string()])
    }

    fn start_serving(&self, port: u16, options: &[&str]) -> Result<Process> {
        let port = port.to_string();
        let arguments = [&["serve", "--name", &self.name, "--port", &port], options].concat();
        let mut server = self.traffic(&arguments)?;
        let first = server.line().context("starting a server")?;
        anyhow::ensure!(first == "ready", "the server said {first:?}");
        Ok(server)
    }

    /// Takes what [`Self::pour`] sends to `port`.
    pub fn drain(&self, port: u16) -> Result<Process> {
        let mut drain = self.traffic(&["drain", "--port", &port.to_string()])?;
        let first = drain.line().context("starting a drain")?;
        anyhow::ensure!(first == "ready", "the drain said {first:?}");
        Ok(drain)
    }

    /// The same, and gives each sender as many bytes in return.
    pub fn drain_and_give(&self, port: u16, bytes: u64) -> Result<Process> {
        let (port, bytes) = (port.to_string(), bytes.to_string());
        let mut drain = self.traffic(&["drain", "--port", &port, "--gives", &bytes])?;
        let first = drain.line().context("starting a drain")?;
        anyhow::ensure!(first == "ready", "the drain said {first:?}");
        Ok(drain)
    }

    /// Runs the traffic program to its end; what it printed.
    pub(crate) fn run_traffic(&self, arguments: &[&str]) -> Result<String> {
        let mut command = process::command(traffic()?, &self.place)?;
        command.args(arguments);
        process::run(command)
    }

    /// Sends bytes by TCP to where they are drained and others given; how many arrived there, and here.
    pub fn exchange(&self, to: &str, bytes: u64) -> Result<(u64, u64)> {
        let said = self.poured(to, bytes)?;
        let count = |field| said.get(field).and_then(Value::as_u64);
        count("arrived")
            .zip(count("given"))
            .with_context(|| format!("{to} did not take it: {said}"))
    }

    fn poured(&self, to: &str, bytes: u64) -> Result<Value> {
        let text = self.run_traffic(&["pour", to, "--bytes", &bytes.to_string()])?;
        serde_json::from_str(&text).with_context(|| format!("{text:?} is no JSON"))
    }

    /// Sends bytes by TCP to where they are drained; how many arrived, and in how many seconds.
    pub fn pour(&self, to: &str, bytes: u64) -> Result<(u64, f64)> {
        let said = self.poured(to, bytes)?;
        let arrived = said.get("arrived").and_then(Value::as_u64);
        let seconds = said.get("seconds").and_then(Value::as_f64);
        arrived
            .zip(seconds)
            .with_context(|| format!("{to} did not take it: {said}"))
    }

    /// Sends datagrams in one piece, which the kernel cuts apart, to who serves; how long each of them was, of
    /// those that were answered.
    pub fn burst(&self, to: &str, count: usize, size: usize) -> Result<Vec<usize>> {
        let (count, size) = (count.to_string(), size.to_string());
        let text = self.run_traffic(&["burst", to, "--count", &count, "--size", &size])?;
        let said: Value = serde_json::from_str(&text)?;
        serde_json::from_value(said.get("reached").cloned().unwrap_or_default())
            .with_context(|| format!("{text:?} is no answer"))
    }

    /// Asks once; what was answered, or the error's name under "error".
    pub fn ask(&self, protocol: &str, to: &str, options: &[&str]) -> Result<Value> {
        let arguments = [&["ask", protocol, to], options].concat();
        let text = self.run_traffic(&arguments)?;
        serde_json::from_str(&text).with_context(|| format!("{text:?} is no JSON"))
    }

    /// Who answers.
    pub fn who_answers(&self, protocol: &str, to: &str) -> Result<String> {
        let answer = self.ask(protocol, to, &[])?;
        let name = answer.get("server").and_then(Value::as_str);
        name.map(str::to_owned)
            .with_context(|| format!("{to} did not answer: {answer}"))
    }
}
