//! Compares this checkout's build with another one, which is called BASE: runs scenarios with both in turns, on the same
//! servers, and says for each figure whether they differ by more than noise. It must never run both at the same time,
//! change this checkout, or say which of them is better: of some figures more is better, of others less.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use harness::world::{World, put_under_test};
use harness::{build, profile_dir, repository};
use serde_json::{Value, json};

use crate::report::{Circumstances, Figure, count};
use crate::rounds::{LEAST_ROUNDS, LEVEL, Pair, heading, median, number};
use crate::scenarios::{SCENARIOS, Scenario};
use crate::{Arguments, Bench, catch};

/// The number of rounds, unless another one is given.
pub(crate) const ROUNDS: u8 = 8;
/// The names of the two builds.
const BASE: &str = "BASE";
const THIS: &str = "this build";
/// Scenarios that run no daemon. They call plugins inside this program, so both builds would have the same figures.
const WITHOUT_DAEMON: [&str; 2] = ["wasm", "languages"];

/// The build that this checkout's is compared with.
pub(crate) struct Base {
    /// What was asked for, and the version.
    description: String,
    binary: PathBuf,
}

/// A scenario and its runs so far.
struct Compared {
    scenario: &'static Scenario,
    runs: Vec<Run>,
}

/// One run of a scenario with one of the builds.
struct Run {
    round: u8,
    /// [`BASE`] or [`THIS`].
    build: &'static str,
    /// The figures, or the reason why there are none.
    result: Result<Vec<Figure>, String>,
}

/// A figure, or the quotient of a figure and the one beside it, with both builds.
struct Comparison {
    label: String,
    unit: &'static str,
    pair: Pair,
}

impl Base {
    /// Finds the binary `base`, or builds the commit `base`.
    ///
    /// # Errors
    ///
    /// When the other arguments leave nothing to compare, or when there is no such build.
    pub(crate) fn prepare(base: &str, arguments: &Arguments) -> anyhow::Result<Self> {
        let Arguments { scenarios, .. } = arguments;
        ensure!(
            !scenarios.is_empty(),
            "--compare needs the names of scenarios: all of them would take hours; --list shows them"
        );
        if let Some(name) = scenarios.iter().find(|name| WITHOUT_DAEMON.contains(&&***name)) {
            anyhow::bail!(
                "{name} runs no daemon but calls plugins inside this program, so it cannot compare two builds"
            );
        }
        ensure!(
            usize::from(arguments.rounds()) >= LEAST_ROUNDS,
            "--compare needs at least {LEAST_ROUNDS} rounds: with fewer, no difference could be told from noise"
        );
        let (name, binary) = if Path::new(base).is_file() {
            let binary = Path::new(base).canonicalize()?;
            ensure!(
                binary != profile_dir().join("tidings"),
                "{base} is where this checkout's build will be; copy the file elsewhere before the code changes"
            );
            (base.to_owned(), binary)
        } else {
            let commit = find_commit(base)?;
            let binary = build::daemon_of(&commit)?;
            (commit, binary)
        };
        let version = Command::new(&binary).arg("--version").output();
        let version = version.with_context(|| format!("{base} is not a program that runs here"))?.stdout;
        let version = String::from_utf8_lossy(&version);
        let version = version.trim().strip_prefix("tidings ").with_context(|| format!("{base} is not tidings"))?;
        Ok(Self { description: format!("{version} {name}"), binary })
    }
}

/// The short hash of the commit that is called `name`.
fn find_commit(name: &str) -> anyhow::Result<String> {
    let mut git = Command::new("git");
    git.args(["rev-parse", "--verify", "--quiet", "--short"]).arg(format!("{name}^{{commit}}"));
    let output = git.current_dir(repository()).output().context("could not run git")?;
    ensure!(output.status.success(), "{name} is neither a file nor a commit of this repository");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Runs the scenarios with both builds, and returns whether all of them ran to their end.
pub(crate) async fn compare(bench: &Bench, base: Base, mut circumstances: Circumstances) -> anyhow::Result<bool> {
    circumstances.0.push((BASE, base.description));
    circumstances.print();
    let (rounds, this) = (bench.arguments.rounds(), World::binary());
    let wanted = SCENARIOS.iter().filter(|scenario| scenario.is_wanted(&bench.arguments));
    let mut all: Vec<Compared> = wanted.map(|scenario| Compared { scenario, runs: Vec::new() }).collect();
    for round in 1..=rounds {
        for Compared { scenario, runs } in &mut all {
            // The order alternates, so that a machine that gets faster or slower all the time favours neither build.
            let (base, this) = ((BASE, &base.binary), (THIS, &this));
            for (build, binary) in if round % 2 == 1 { [base, this] } else { [this, base] } {
                eprintln!("round {round} of {rounds}: measuring {} with {build} ...", scenario.name);
                let run = async {
                    put_under_test(binary);
                    let figures = (scenario.run)(bench).await;
                    // Every run begins with new tables: tables that one build keeps for all its rounds may be faster or
                    // slower by chance, and that would look like a difference.
                    bench.remove_kept_stage().await;
                    figures
                };
                runs.push(Run { round, build, result: catch(run).await });
            }
        }
        let scenarios: Vec<Value> = all.iter().map(Compared::json).collect();
        // Written after each round, so that an interrupted run leaves the rounds so far.
        bench.write_json(&json!({ "circumstances": circumstances.json(), "scenarios": scenarios }))?;
    }
    Ok(print(&all))
}

/// Prints all comparisons, and returns whether every run came to its end.
fn print(all: &[Compared]) -> bool {
    let (mut compared, mut differing, mut complete) = (0, 0, true);
    for scenario in all {
        println!("\n{}: {}\n{}", scenario.scenario.name, scenario.scenario.description, heading());
        for Comparison { label, unit, pair } in scenario.comparisons() {
            println!("{}", pair.line(&label, unit));
            compared += 1;
            differing += usize::from(pair.differs() == Some(true));
        }
        for run in &scenario.runs {
            if let Err(reason) = &run.result {
                println!("  round {} with {} could not be measured: {reason}", run.round, run.build);
                complete = false;
            }
        }
    }
    let by_chance = number(count(compared) * LEVEL);
    println!(
        "\n{differing} of {compared} lines differ; of two builds that are the same, up to about {by_chance} would"
    );
    complete
}

impl Compared {
    /// Every figure, and after each its quotient with the one beside it.
    fn comparisons(&self) -> Vec<Comparison> {
        let of = |build| {
            let runs = self.runs.iter().filter(move |run| run.build == build);
            runs.filter_map(|run| run.result.as_ref().ok()).collect::<Vec<_>>()
        };
        let (base, this) = (of(BASE), of(THIS));
        let figures = base.first().into_iter().flat_map(|first| first.iter().enumerate());
        let rows = figures.flat_map(|(place, figure)| {
            let compare = |label, unit, value: fn(&Figure) -> Option<f64>| {
                // A quotient with nothing is no number.
                let values = |runs: &[&Vec<Figure>]| {
                    let values = runs.iter().filter_map(|figures| figures.get(place).and_then(value));
                    values.filter(|value| value.is_finite()).collect()
                };
                Comparison { label, unit, pair: Pair { base: values(&base), this: values(&this) } }
            };
            let share = figure
                .beside_label()
                .map(|beside| compare(format!("  beside: {beside}"), "%", |figure| Some(figure.share()? * 100.0)));
            [Some(compare(figure.label.clone(), figure.unit, |figure| Some(figure.value()))), share]
        });
        rows.flatten().filter(|row| !row.pair.base.is_empty() && !row.pair.this.is_empty()).collect()
    }

    /// The comparisons, and what they were made from: every figure of every round.
    fn json(&self) -> Value {
        let comparisons = self.comparisons().into_iter().map(|Comparison { label, unit, pair }| {
            let rounds = |rounds: &[f64]| json!({ "value": median(rounds.iter().copied()), "rounds": rounds });
            json!({
                "what": label.trim_start(), "unit": unit, "base": rounds(&pair.base), "this": rounds(&pair.this),
                "p": pair.probability(), "differs": pair.differs(),
            })
        });
        let runs = self.runs.iter().map(|run| {
            let figures = run.result.iter().flatten().map(Figure::json).collect::<Vec<_>>();
            json!({ "round": run.round, "build": run.build, "figures": figures, "failed": run.result.as_ref().err() })
        });
        json!({
            "scenario": self.scenario.name, "comparisons": comparisons.collect::<Vec<_>>(),
            "runs": runs.collect::<Vec<_>>(),
        })
    }
}
