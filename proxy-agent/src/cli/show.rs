//! What there is to see, as text for a person or JSON for a program.

use std::{io::ErrorKind, process::ExitCode};

use anyhow::{Context, Result, bail};
use aya::maps::{Map, PerCpuArray};
use penstock_common::{Algorithm, Counter, Forwarding};
use serde::Serialize;

use super::{Counting, Look, Output, pinned, pod_network::ways};
use crate::{
    dataplane::{Dataplane, bpf::Bpf, pins::Pins},
    ipc,
    report::{self, Report},
    stats::{Statistics, Stats},
};

pub(super) fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("writing JSON")?;
    println!("{text}");
    Ok(())
}

/// A table: columns as wide as their widest cell.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) {
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(column, title)| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
                .max(title.len())
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(header.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

pub(super) async fn agent(look: &Look) -> Result<Option<Report>> {
    ipc::report(&look.place.run_dir).await
}

/// The pins, if anything is pinned.
fn installed(look: &Look) -> Result<Option<Pins>> {
    let pins = Pins::at(&look.place.bpffs);
    match pins.is_there() {
        Ok(is_there) => Ok(is_there.then_some(pins)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => bail!(
            "permission to read {} is denied; run this as root",
            pins.root().display()
        ),
        Err(error) => Err(error).with_context(|| format!("reading {}", pins.root().display())),
    }
}

/// The pins, without which there is nothing to see.
pub(super) fn pins(look: &Look) -> Result<Pins> {
    installed(look)?.with_context(|| {
        format!(
            "nothing is installed: there is no {}; start an agent, or pass its --bpffs",
            Pins::at(&look.place.bpffs).root().display()
        )
    })
}

pub(super) async fn status(look: &Look) -> Result<ExitCode> {
    let Some(report) = agent(look).await? else {
        let pins = installed(look)?;
        if look.output == Output::Json {
            json(
                &serde_json::json!({ "running": false, "synced": false, "pinned": pins.is_some() }),
            )?;
            return Ok(ExitCode::FAILURE);
        }
        println!("no agent answers at {}", look.place.run_dir.display());
        match pins {
            Some(pins) => println!(
                "the kernel goes on serving what is pinned under {}",
                pins.root().display()
            ),
            None => println!("nothing is installed"),
        }
        return Ok(ExitCode::FAILURE);
    };
    let code = if report.synced {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    if look.output == Output::Json {
        let mut value = serde_json::to_value(&report).context("writing JSON")?;
        if let Some(object) = value.as_object_mut() {
            object.insert("running".to_owned(), true.into());
        }
        return json(&value).map(|()| code);
    }
    let word = match (report.synced, report.settled) {
        (true, true) => "serving".to_owned(),
        (true, false) => "serving, with work left to do".to_owned(),
        _ => format!(
            "waiting for the first list of {}",
            report.awaited.join(", ")
        ),
    };
    println!(
        "node {}: {word} (agent {}, process {}, up {} s)",
        report.node, report.version, report.pid, report.uptime_secs
    );
    println!(
        "  {} services, {} endpoint slices, {} endpoints; {} backends and {} slots in the kernel",
        report.services,
        report.endpoint_slices,
        report.endpoints,
        report.backends_used,
        report.slots_used
    );
    for (kind, state) in &report.sources {
        println!("  {kind}: {state}");
    }
    if let Some(network) = &report.network {
        let state = if network.ready {
            format!(
                "pods get addresses from {}; {} pods, {} ranges of other nodes",
                network.pod_cidrs.join(" and "),
                report.pods.len(),
                network.nodes.len()
            )
        } else {
            "pods can't be given a network yet".to_owned()
        };
        println!("  network: {state}");
        if network.ready {
            println!("    {}", ways(network));
        }
    }
    let attached = report
        .interfaces
        .iter()
        .filter(|interface| interface.attached)
        .count();
    println!("  packet hooks on {attached} pod interfaces");
    for interface in report
        .interfaces
        .iter()
        .filter(|interface| !interface.attached)
    {
        println!(
            "  {}: {}",
            interface.name,
            interface.error.as_deref().unwrap_or("not yet")
        );
    }
    for interface in &report.interfaces {
        match (&interface.xdp, &interface.xdp_error) {
            (Some(mode), _) => println!("  XDP on {}: {mode}", interface.name),
            (None, Some(error)) => println!("  XDP: {error}"),
            (None, None) => {}
        }
    }
    let filled = report.tables.iter().filter(|fill| fill.used > 0);
    let filled: Vec<Vec<String>> = filled
        .map(|fill| {
            let word = if fill.percent() == 0 {
                "under 1 %".to_owned()
            } else {
                format!("{} %", fill.percent())
            };
            vec![
                format!("  {}", fill.table),
                fill.used.to_string(),
                fill.limit.to_string(),
                word,
            ]
        })
        .collect();
    if !filled.is_empty() {
        table(&["  TABLE", "USED", "OF", "FULL"], &filled);
    }
    for (title, lines) in [("notes:", &report.notes), ("problems:", &report.problems)] {
        if !lines.is_empty() {
            println!("{title}");
        }
        for line in lines {
            println!("  {line}");
        }
    }
    Ok(code)
}

/// The report of a running agent, without which there is nothing to see.
pub(super) async fn running(look: &Look) -> Result<Report> {
    let report = agent(look).await?;
    report.with_context(|| {
        format!(
            "no agent answers at {}; start one, or pass its --run-dir",
            look.place.run_dir.display()
        )
    })
}

/// The ports that are served: the agent's, with their names, or the kernel's; and what was counted of
/// them.
async fn ports(args: &Counting) -> Result<Vec<report::Port>> {
    let mut ports = uncounted(&args.look).await?;
    if !args.stats && args.look.output == Output::Text {
        return Ok(ports);
    }
    let read = || Ok::<_, anyhow::Error>(Statistics::read(&pins(&args.look)?)?);
    match read() {
        Ok(all) => ports.iter_mut().for_each(|port| port.count(&all)),
        // The agent's answer is good without, where it alone may read the maps.
        Err(error) if args.stats => return Err(error),
        Err(_) => {}
    }
    Ok(ports)
}

async fn uncounted(look: &Look) -> Result<Vec<report::Port>> {
    if let Some(ports) = ipc::ports(&look.place.run_dir).await? {
        return Ok(ports);
    }
    let ports = pinned::ports(&Bpf::open(&pins(look)?)?.observe()?);
    if look.output == Output::Text {
        println!("no agent is running; this is what the kernel serves, which knows no names:");
    }
    Ok(ports)
}

/// A name in a table.
pub(super) fn cell(name: Option<&str>) -> String {
    name.filter(|name| !name.is_empty())
        .unwrap_or("-")
        .to_owned()
}

/// Where the columns of services begin that are shown if one is not the default.
const UNUSUAL_COLUMNS: usize = 4;

/// The columns of what was counted.
const STATS: [&str; 5] = ["CONNECTIONS", "FLOWS", "SOCKETS", "SENT", "ANSWERED"];

/// What was counted, in the columns of [`STATS`].
fn counts(stats: Option<&Stats>) -> Vec<String> {
    let stats = stats.copied().unwrap_or_default();
    let both = |packets, bytes| format!("{packets}/{}", size(bytes));
    vec![
        stats.connections.to_string(),
        stats.flows.to_string(),
        (stats.tcp_sockets + stats.udp_sockets).to_string(),
        both(stats.request_packets, stats.request_bytes),
        both(stats.reply_packets, stats.reply_bytes),
    ]
}

/// Bytes with three digits and a unit (IEC 80000-13).
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        // What would be rounded to four digits is the next unit's.
        if value < 999.5 {
            break;
        }
        value /= 1_024.0;
        unit = next;
    }
    if unit == "B" || value >= 99.95 {
        format!("{value:.0}{unit}")
    } else if value >= 9.995 {
        format!("{value:.1}{unit}")
    } else {
        format!("{value:.2}{unit}")
    }
}

pub(super) async fn services(args: &Counting) -> Result<()> {
    let ports = ports(args).await?;
    if args.look.output == Output::Json {
        return json(&ports);
    }
    let default = Algorithm::default().label();
    let has_algorithms = ports.iter().any(|port| port.algorithm != default);
    let policy = |port: &report::Port| {
        let report::Policies {
            internal_policy,
            external_policy,
            ..
        } = &port.policies;
        match external_policy {
            Some(external) if external != internal_policy => {
                format!("{internal_policy}, outside {external}")
            }
            _ => internal_policy.clone(),
        }
    };
    let has_ways = ports
        .iter()
        .any(|port| port.forwarding != Forwarding::default().label());
    let way = |port: &report::Port| match port.forwarding_obstacle {
        Some(_) => format!("{} for {}", Forwarding::Snat.label(), port.forwarding),
        None => port.forwarding.clone(),
    };
    let has_policies = ports.iter().any(|port| policy(port).contains("Local"));
    let row = |port: &report::Port| {
        let active = port
            .backends
            .iter()
            .filter(|backend| backend.state == "active")
            .count();
        let resting = port.backends.len() - active;
        let mut backends = match active {
            0 => port.policies.on_empty.clone(),
            1 => "1 backend".to_owned(),
            _ => format!("{active} backends"),
        };
        if resting > 0 {
            backends = format!("{backends}, {resting} resting");
        }
        let affinity = match port.affinity_secs {
            0 => "-".to_owned(),
            seconds => format!("{seconds} s"),
        };
        let mut cells = vec![
            cell(port.service.as_deref()),
            cell(port.port.as_deref()),
            port.protocol.clone(),
            port.frontends.join(" "),
            affinity,
            backends,
        ];
        if has_ways {
            cells.insert(UNUSUAL_COLUMNS, way(port));
        }
        if has_algorithms {
            cells.insert(UNUSUAL_COLUMNS, port.algorithm.clone());
        }
        if has_policies {
            cells.insert(UNUSUAL_COLUMNS, policy(port));
        }
        if args.stats {
            cells.extend(counts(port.stats.as_ref()));
        }
        cells
    };
    let rows: Vec<Vec<String>> = ports.iter().map(row).collect();
    if rows.is_empty() {
        println!("no services");
    } else {
        let mut head = vec![
            "SERVICE",
            "PORT",
            "PROTOCOL",
            "FRONTENDS",
            "AFFINITY",
            "BACKENDS",
        ];
        if has_ways {
            head.insert(UNUSUAL_COLUMNS, "FORWARDING");
        }
        if has_algorithms {
            head.insert(UNUSUAL_COLUMNS, "ALGORITHM");
        }
        if has_policies {
            head.insert(UNUSUAL_COLUMNS, "POLICY");
        }
        if args.stats {
            head.extend(STATS);
        }
        table(&head, &rows);
    }
    Ok(())
}

pub(super) async fn backends(args: &Counting) -> Result<()> {
    #[derive(Serialize)]
    struct Row<'a> {
        service: Option<&'a str>,
        port: Option<&'a str>,
        protocol: &'a str,
        backend: &'a report::Backend,
    }
    let ports = ports(args).await?;
    let rows: Vec<Row<'_>> = ports
        .iter()
        .flat_map(|port| {
            port.backends.iter().map(|backend| Row {
                service: port.service.as_deref(),
                port: port.port.as_deref(),
                protocol: &port.protocol,
                backend,
            })
        })
        .collect();
    if args.look.output == Output::Json {
        return json(&rows);
    }
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let mut cells = vec![
                cell(row.service),
                cell(row.port),
                row.protocol.to_owned(),
                row.backend.address.clone(),
                row.backend.state.clone(),
                format!("{}.{}", row.backend.id, row.backend.generation),
            ];
            if args.stats {
                cells.extend(counts(row.backend.stats.as_ref()));
            }
            cells
        })
        .collect();
    if rows.is_empty() {
        println!("no backends");
    } else {
        let mut head = vec!["SERVICE", "PORT", "PROTOCOL", "BACKEND", "STATE", "ID"];
        if args.stats {
            head.extend(STATS);
        }
        table(&head, &rows);
    }
    Ok(())
}

/// A counter's sum over all CPUs.
#[derive(Serialize)]
struct Count {
    name: &'static str,
    count: u64,
    dropped: bool,
    meaning: &'static str,
}

pub(super) fn drops(look: &Look) -> Result<()> {
    let map = pins(look)?.map("COUNTERS")?;
    let map: PerCpuArray<_, u64> =
        PerCpuArray::try_from(Map::PerCpuArray(map)).context("map COUNTERS")?;
    let counts: Result<Vec<Count>> = Counter::ALL
        .iter()
        .map(|counter| {
            let values = map
                .get(&(*counter as u32), 0)
                .context("reading map COUNTERS")?;
            Ok(Count {
                name: counter.label(),
                count: values.iter().sum(),
                dropped: counter.is_drop(),
                meaning: counter.explanation(),
            })
        })
        .collect();
    let counts = counts?;
    if look.output == Output::Json {
        return json(&counts);
    }
    let rows = |dropped| -> Vec<Vec<String>> {
        counts
            .iter()
            .filter(|count| count.dropped == dropped && count.count > 0)
            .map(|count| {
                vec![
                    count.name.to_owned(),
                    count.count.to_string(),
                    count.meaning.to_owned(),
                ]
            })
            .collect()
    };
    let drops = rows(true);
    if drops.is_empty() {
        println!("nothing was dropped or refused");
    } else {
        table(&["REASON", "COUNT", "MEANING"], &drops);
    }
    let done = rows(false);
    if !done.is_empty() {
        println!();
        table(&["DONE", "COUNT", "MEANING"], &done);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1_000, "0.98KiB"),
            (1_024, "1.00KiB"),
            (10_240, "10.0KiB"),
            (102_400, "100KiB"),
            (1_023_000, "999KiB"),
            (1_024_000, "0.98MiB"),
            (5 << 30, "5.00GiB"),
            (u64::MAX, "16.0EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
