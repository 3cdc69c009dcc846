//! Measures Penstock beside what it replaces, in one run and in turns.
//!
//! Absolute times say something about this machine only; they are written down with its name.

mod bridge;
mod claims;
mod cluster;
mod cni;
mod command;
mod contender;
mod control;
mod family;
mod figures;
mod flat;
mod load;
mod machine;
mod outside;
mod packets;
mod plot;
mod pods;
mod programs;
mod report;
mod results;
mod services;
mod slower;
mod turns;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, Parser};

use command::Command;
use machine::{Machine, Watch};
use results::{Keeper, Results};
use services::program::{self, Program};
use turns::Effort;

/// Measures Penstock beside what it replaces.
#[derive(Parser)]
struct Cli {
    /// Everything that there is, in many rounds: hours instead of minutes.
    #[arg(long, global = true)]
    full: bool,
    #[command(flatten)]
    turns: TurnArgs,
    /// Where results are written [default: bench/results].
    #[arg(long, value_name = "DIR", global = true)]
    results: Option<PathBuf>,
    /// What the files are called.
    #[arg(long, default_value = "latest", global = true)]
    name: String,
    #[command(subcommand)]
    command: Option<Command>,
}

/// How much is measured.
#[derive(Args)]
struct TurnArgs {
    /// How often each contender gets its turn [default: 7, 6 if no comparison is named, 15 with --full].
    #[arg(long, global = true, value_parser = rounds)]
    rounds: Option<usize>,
    /// How long a turn is [default: 300, 70 if no comparison is named, 400 with --full].
    #[arg(long, value_name = "MILLISECONDS", global = true)]
    turn_ms: Option<u64>,
    /// How long it goes on before, unmeasured [default: 100, 20 if no comparison is named, 100 with --full].
    #[arg(long, global = true, value_name = "MILLISECONDS")]
    warm_up_ms: Option<u64>,
    /// Only what has this in its name, such as "connect" or "one processor"; after an equals sign, what is
    /// called exactly so (may be repeated; `list` prints all names).
    #[arg(long, global = true, value_name = "TEXT")]
    only: Vec<String>,
    /// Only contenders that have this in their names (may be repeated; `list` prints all).
    #[arg(long = "contender", global = true, value_name = "TEXT")]
    contenders: Vec<String>,
}

/// What a run without a comparison's name does not measure.
const LEFT_OUT: &str = "numbers of services but 1 and 1,000, and of the latter the first in kube-proxy's order; trials \
    that need whole seconds (wrk, iperf3) or two processors, but for eight streams; node ports of more than one \
    service, those that are forwarded by `tunnel` and `dsr` and the pod one way, and over IPv6 all but packets; plugins \
    with IPv4 alone, and with their state in memory";

impl TurnArgs {
    /// A comparison that is named gets more than each of all.
    fn effort(&self, is_full: bool, is_named: bool) -> Effort {
        let (rounds, turn_ms, warm_up_ms) = match (is_full, is_named) {
            (true, _) => (15, 400, 100),
            (false, true) => (7, 300, 100),
            (false, false) => (figures::LEAST, 70, 20),
        };
        Effort {
            rounds: self.rounds.unwrap_or(rounds),
            turn_ms: self.turn_ms.unwrap_or(turn_ms),
            warm_up_ms: self.warm_up_ms.unwrap_or(warm_up_ms),
            only: self.only.clone(),
            contenders: self.contenders.clone(),
            is_brief: !is_full && !is_named && self.only.is_empty(),
            command: String::new(),
        }
    }
}

fn rounds(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rounds) if rounds >= figures::LEAST => Ok(rounds),
        _ => Err(format!(
            "has to be {} at least: less have no 95 % interval",
            figures::LEAST
        )),
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let folder = cli.results.clone().unwrap_or(default);
    let keeper = match &cli.command {
        Some(Command::Load(load)) => return load::run(load),
        Some(Command::List) => {
            command::list();
            return Ok(());
        }
        Some(Command::Report { files }) => {
            Keeper::new(Results::read_all(files)?, &folder, &cli.name)
        }
        _ => measure(&cli, &folder)?,
    };
    for file in keeper.write()? {
        println!("{}", file.display());
    }
    Ok(())
}

/// Of these comparisons, those that something is asked for of. What is called like nothing in any of them is refused.
fn asked_for<'a>(
    commands: &'a [Command],
    effort: &Effort,
    kube_proxy: Option<&Program>,
) -> Result<Vec<&'a Command>> {
    let each: Vec<(&Command, Vec<String>, Vec<String>)> = commands
        .iter()
        .map(|command| (command, command.trials(), command.contenders(kube_proxy)))
        .collect();
    let trials: Vec<String> = each
        .iter()
        .flat_map(|(_, trials, _)| trials.clone())
        .collect();
    let contenders: Vec<String> = each.iter().flat_map(|(.., all)| all.clone()).collect();
    effort.check(&trials, &contenders)?;
    let asked = each
        .into_iter()
        .filter(|(_, trials, contenders)| effort.concerns(trials, contenders));
    Ok(asked.map(|(command, ..)| command).collect())
}

fn measure(cli: &Cli, folder: &Path) -> Result<Keeper> {
    let effort = cli.turns.effort(cli.full, cli.command.is_some());
    let all = Command::all();
    let commands = match &cli.command {
        Some(command) => std::slice::from_ref(command),
        None => &all,
    };
    let kube_proxy = program::found();
    let commands = asked_for(commands, &effort, kube_proxy.as_ref())?;
    let machine = Machine::look();
    machine.introduce();
    let mut keeper = Keeper::new(Results::new(machine), folder, &cli.name);
    keeper.results.left_out = effort.is_brief.then(|| LEFT_OUT.to_owned());
    for command in commands {
        let watch = Watch::begin(machine::NOBODY);
        command.measure(&effort, cli.full, &mut keeper)?;
        // What its own programs do between trials disturbs none.
        keeper.results.machine.quiet.push(watch.end().of_others());
        // What is measured stays, should the next comparison fail.
        keeper.write()?;
    }
    if !effort.only.is_empty() || !effort.contenders.is_empty() {
        anyhow::ensure!(
            !keeper.results.outcomes.is_empty(),
            "nothing of what was asked for could be measured: {:?}",
            keeper.results.absent
        );
    }
    for reason in keeper.results.reservations() {
        println!("WARNING: {reason}");
    }
    Ok(keeper)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effort(arguments: &[&str]) -> Effort {
        let cli = Cli::try_parse_from([&["bench"], arguments].concat()).unwrap();
        cli.turns.effort(cli.full, cli.command.is_some())
    }

    #[test]
    fn everything_can_be_asked_for_of_one_comparison_too() {
        for arguments in [
            &["services", "--full"][..],
            &["--full", "services"],
            &["--full"],
        ] {
            let effort = effort(arguments);
            assert_eq!((effort.rounds, effort.is_brief), (15, false));
        }
    }

    #[test]
    fn a_run_is_brief_where_nothing_is_named() {
        assert!(effort(&[]).is_brief);
        assert!(!effort(&["pods"]).is_brief);
        assert!(!effort(&["--only", "wrk"]).is_brief);
        assert_eq!(effort(&["--rounds", "9"]).rounds, 9);
    }

    /// A printed command's words, as a shell takes them apart.
    fn words(command: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
        for character in command.chars() {
            match (quote, character) {
                (Some(open), close) if open == close => quote = None,
                (None, '\'' | '"') => quote = Some(character),
                (None, ' ') => words.push(std::mem::take(&mut word)),
                _ => word.push(character),
            }
        }
        assert_eq!(quote, None, "{command}");
        words.push(word);
        words
    }

    /// What was asked for by a printed command.
    fn parsed(command: &str) -> (Command, Effort) {
        let words = [vec!["bench".to_owned()], words(command)].concat();
        let cli = Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{command}: {error}"));
        let effort = cli.turns.effort(cli.full, true);
        (cli.command.unwrap(), effort)
    }

    /// What it selects: trials and contenders, by name.
    fn selected(command: &str) -> (Vec<String>, Vec<String>) {
        let (comparison, effort) = parsed(command);
        let (mut trials, mut contenders) = (comparison.trials(), comparison.contenders(None));
        effort.check(&trials, &contenders).unwrap();
        trials.retain(|name| effort.wants(name));
        contenders.retain(|name| effort.names(name));
        (trials, contenders)
    }

    #[test]
    fn every_printed_command_selects_its_trial_and_the_same_contenders() {
        let mut printed = 0;
        for part in Command::all().iter().flat_map(Command::printed) {
            let (comparison, _) = parsed(&part);
            let contenders = comparison.contenders(None);
            for trial in comparison.trials() {
                // All of them, and each of them alone.
                let alone = contenders.iter().map(|name| vec![name.clone()]);
                for wanted in alone.chain([Vec::new()]) {
                    let effort = Effort {
                        contenders: wanted,
                        ..effort(&[])
                    };
                    let mut expected = contenders.clone();
                    expected.retain(|name| effort.names(name));
                    let command = effort.of(part.clone()).to_repeat(Some(&trial));
                    let found = selected(&command);
                    assert_eq!(found, (vec![trial.clone()], expected), "{command}");
                    printed += 1;
                }
            }
        }
        assert!(printed > 500, "{printed} commands");
    }

    #[test]
    fn comparisons_without_what_is_asked_for_are_left_out() {
        let effort = effort(&["--only", "one processor"]);
        let all = Command::all();
        let asked = asked_for(&all, &effort, None).unwrap();
        // Some comparisons have no such trial.
        assert!(!asked.is_empty() && asked.len() < all.len());
        let nothing = self::effort(&["--contender", "no such"]);
        let error = asked_for(&all, &nothing, None).err().unwrap().to_string();
        assert!(error.contains("Penstock, at the socket"), "{error}");
    }
}
