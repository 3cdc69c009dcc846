//! The comparisons, as one asks for them.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use crate::{
    cni, control,
    family::Family,
    flat, load, outside, packets, pods, programs,
    results::Keeper,
    services::{self, program::Program},
    turns::{Effort, Trial},
};

/// Calls of a CNI plugin in a turn: enough for six turns to tell what one of a hundred takes.
const CALLS: usize = 62;

/// What is compared.
#[derive(Subcommand)]
pub enum Command {
    /// From objects to map entries, in the agent's process and in this one: everything at once, then
    /// one endpoint at a time.
    Control {
        /// How many services there are, and how many endpoints each has.
        #[arg(long, value_delimiter = ',', default_values_t = control::Shape::ALL)]
        shapes: Vec<control::Shape>,
        /// How many single changes are measured [default: 1,000, and 200 if no comparison is named].
        #[arg(long)]
        changes: Option<usize>,
    },
    /// Pod to pod, on one node and on two.
    Pods,
    /// What CNI plugins take to give a pod its network, and to take it away.
    Cni {
        /// Calls in a turn [default: 62, 200 with --full].
        #[arg(long)]
        calls: Option<usize>,
        /// Where plugins keep what they gave to whom [default: all].
        #[arg(long, value_delimiter = ',')]
        state: Vec<cni::State>,
    },
    /// What each packet costs in each program, by itself.
    Programs {
        /// Flows that are all known at once, besides a thousand.
        #[arg(long, default_value_t = 100_000)]
        flows: usize,
    },
    /// To a ClusterIP: Penstock's ways and kube-proxy's.
    Services {
        /// How many there are [default: 1,1000, and 1,1000,5000,10000,50000 with --full].
        #[arg(long, value_delimiter = ',')]
        services: Vec<usize>,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = services::Way::ALL)]
        ways: Vec<services::Way>,
    },
    /// Penstock with few services and with many, side by side.
    Flat {
        /// How many there are; the others are compared with the first.
        #[arg(long, value_delimiter = ',', default_values_t = flat::COUNTS)]
        services: Vec<usize>,
    },
    /// From clients outside to a node port: Penstock's ways and kube-proxy's.
    Outside {
        /// How many services there are [default: 1, and 1,1000 with --full].
        #[arg(long, value_delimiter = ',')]
        services: Vec<usize>,
        /// Families of addresses, one after the other [default: ipv4, and both with --full].
        #[arg(long, value_delimiter = ',')]
        family: Vec<Family>,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = outside::Way::ALL)]
        ways: Vec<outside::Way>,
    },
    /// What one processor forwards from clients outside to a backend on another node.
    Packets {
        /// How many services there are [default: 1, and 1,000 with --full].
        #[arg(long)]
        services: Option<usize>,
        /// How many flows take turns; a power of two.
        #[arg(long, default_value_t = 4_096, value_parser = load::power_of_two)]
        flows: u32,
        /// Families of addresses, one after the other.
        #[arg(long, value_delimiter = ',', default_values_t = Family::ALL)]
        family: Vec<Family>,
        /// Which ways; the first is what the others are compared with.
        #[arg(long, value_delimiter = ',', default_values_t = packets::WAYS)]
        ways: Vec<outside::Way>,
    },
    /// The names of all trials and contenders, for --only and --contender.
    List,
    /// Writes the report and the pictures of earlier runs anew, as if they had been one.
    Report {
        /// Their JSON.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    #[command(hide = true)]
    Load(load::Load),
}

impl Command {
    /// All comparisons, with what they measure by default.
    pub fn all() -> Vec<Self> {
        vec![
            Self::Control {
                shapes: control::Shape::ALL.to_vec(),
                changes: None,
            },
            Self::Cni {
                calls: None,
                state: Vec::new(),
            },
            Self::Pods,
            Self::Programs { flows: 100_000 },
            Self::Services {
                services: Vec::new(),
                ways: services::Way::ALL.to_vec(),
            },
            Self::Flat {
                services: flat::COUNTS.to_vec(),
            },
            Self::Outside {
                services: Vec::new(),
                family: Vec::new(),
                ways: outside::Way::ALL.to_vec(),
            },
            Self::Packets {
                services: None,
                flows: 4_096,
                family: Family::ALL.to_vec(),
                ways: packets::WAYS.to_vec(),
            },
        ]
    }

    /// Its name on the command line.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Control { .. } => "control",
            Self::Pods => "pods",
            Self::Cni { .. } => "cni",
            Self::Programs { .. } => "programs",
            Self::Services { .. } => "services",
            Self::Flat { .. } => "flat",
            Self::Outside { .. } => "outside",
            Self::Packets { .. } => "packets",
            Self::List => "list",
            Self::Report { .. } => "report",
            Self::Load(_) => "load",
        }
    }

    /// The names of all trials.
    pub fn trials(&self) -> Vec<String> {
        let trials = |trials: &[Trial]| trials.iter().map(Trial::name).collect();
        match self {
            Self::Pods => trials(&pods::TRIALS),
            Self::Services { .. } => services::names(),
            Self::Flat { .. } => flat::names(),
            Self::Outside { .. } => trials(&outside::TRIALS),
            Self::Packets { flows, .. } => packets::names(*flows),
            Self::Cni { state, .. } => cni::names(state),
            Self::Control { .. } | Self::Programs { .. } => Vec::new(),
            Self::List | Self::Report { .. } | Self::Load(_) => Vec::new(),
        }
    }

    /// The names of all contenders, with this kube-proxy.
    pub fn contenders(&self, kube_proxy: Option<&Program>) -> Vec<String> {
        let outside = |ways: &[outside::Way]| {
            let names = ways.iter().map(|way| way.name(kube_proxy).to_owned());
            names.collect()
        };
        match self {
            Self::Pods => pods::contenders(),
            Self::Services { ways, .. } => {
                let names = ways.iter().map(|way| way.name(kube_proxy).to_owned());
                names.collect()
            }
            Self::Flat { services } => flat::contenders(services),
            Self::Outside { ways, .. } | Self::Packets { ways, .. } => outside(ways),
            Self::Cni { .. } => cni::contenders(),
            Self::Control { .. } | Self::Programs { .. } => Vec::new(),
            Self::List | Self::Report { .. } | Self::Load(_) => Vec::new(),
        }
    }

    /// Measures.
    pub fn measure(&self, effort: &Effort, is_full: bool, keeper: &mut Keeper) -> Result<()> {
        let brief_or = |brief, other| if effort.is_brief { brief } else { other };
        match self {
            Self::Control { shapes, changes } => {
                let changes = changes.unwrap_or(brief_or(200, 1_000));
                keeper.results.control = Some(control::measure(shapes, changes)?);
                Ok(())
            }
            Self::Pods => pods::measure(effort, keeper),
            Self::Programs { flows } => {
                keeper.results.programs = Some(programs::measure(effort, *flows)?);
                Ok(())
            }
            Self::Cni { calls, state } => {
                let calls = calls.unwrap_or(if is_full { 200 } else { CALLS });
                cni::measure(effort, calls, state, keeper)
            }
            Self::Services { services, ways } => {
                let services = match services.as_slice() {
                    [] if is_full => &[1, 1_000, 5_000, 10_000, 50_000],
                    [] => &[1, 1_000][..],
                    named => named,
                };
                services::measure(services, ways, effort, keeper)
            }
            Self::Flat { services } => flat::measure(services, effort, keeper),
            Self::Outside {
                services,
                family,
                ways,
            } => {
                let services = match services.as_slice() {
                    [] if is_full => &[1, 1_000],
                    [] => &[1][..],
                    named => named,
                };
                let families = match family.as_slice() {
                    [] if is_full => &Family::ALL,
                    [] => &[Family::V4][..],
                    named => named,
                };
                for family in families {
                    for count in services {
                        outside::measure(*count, *family, ways, effort, keeper)?;
                        keeper.write()?;
                    }
                }
                Ok(())
            }
            Self::Packets {
                services,
                flows,
                family,
                ways,
            } => {
                let services = services.unwrap_or(if is_full { 1_000 } else { 1 });
                for family in family {
                    packets::measure(services, *flows, *family, ways, effort, keeper)?;
                }
                Ok(())
            }
            Self::List | Self::Report { .. } | Self::Load(_) => Ok(()),
        }
    }
}

/// Prints the names of all trials and of all contenders.
pub fn list() {
    let kube_proxy = services::program::found();
    for comparison in Command::all() {
        let (trials, contenders) = (
            comparison.trials(),
            comparison.contenders(kube_proxy.as_ref()),
        );
        if trials.is_empty() {
            continue;
        }
        println!("{}:", comparison.name());
        for name in trials {
            println!("  {name}");
        }
        println!("  between");
        for name in contenders {
            println!("    {name}");
        }
    }
}

#[cfg(test)]
impl Command {
    /// What the report prints of it, without how much of it and which trial: of more and of less than all ways.
    pub fn printed(&self) -> Vec<String> {
        let families = Family::ALL.into_iter();
        match self {
            Self::Pods => vec![pods::command()],
            Self::Services { ways, .. } => {
                vec![services::command(1_000, ways), services::command(1, ways)]
            }
            Self::Flat { services } => vec![flat::command(services)],
            Self::Outside { ways, .. } => families
                .map(|family| outside::command(1, family, ways))
                .collect(),
            Self::Packets { flows, ways, .. } => families
                .map(|family| packets::command(1, *flows, family, ways))
                .collect(),
            Self::Cni { .. } => cni::State::ALL
                .map(|state| cni::command(CALLS, state))
                .to_vec(),
            Self::Control { .. } | Self::Programs { .. } => Vec::new(),
            Self::List | Self::Report { .. } | Self::Load(_) => Vec::new(),
        }
    }
}
