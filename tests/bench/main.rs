//! `cargo measure` measures how fast and how punctual the daemon is. Each figure stands beside its limit or a rival,
//! measured in the same run, and beside its target; or two builds are compared. The servers are private and have the
//! settings that users have. README.md explains each line.

mod calls;
mod compare;
mod drain;
mod enqueue;
mod failover;
mod grow;
mod intake;
mod lateness;
mod limits;
mod load;
mod plugins;
mod probe;
mod raw;
mod recurrences;
mod replay;
mod report;
mod resources;
mod rounds;
mod scenarios;
mod settings;
mod sizes;
mod statements;
mod trouble;

use std::any::Any;
use std::cell::RefCell;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use futures_util::FutureExt as _;
use harness::servers::Servers;
use serde_json::Value;

use compare::Base;
use load::Stage;
use report::{Figure, Report};
use scenarios::{Part, SCENARIOS, Scenario};

/// The daemon's allocator, so that the raw client that it is compared with uses the same.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub(crate) const MILLION: u32 = 1_000_000;
/// The plugins of most scenarios: all of the repository.
const PLUGINS: [&str; 3] = ["message", "game-reminder", "game-status"];
/// PostgreSQL's settings: durable as for users, with `pg_stat_statements` loaded but counting only where a scenario
/// enables it.
const SETTINGS: &str = "fsync = on\nshared_preload_libraries = 'pg_stat_statements'\npg_stat_statements.track = none";

/// Measures Tidings on servers of its own
#[derive(Debug, Parser)]
#[command(name = "cargo measure --")]
struct Arguments {
    /// The scenarios to measure; without any, all that have targets
    scenarios: Vec<String>,
    /// List all scenarios
    #[arg(long)]
    list: bool,
    /// Write every figure, with each round, into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Multiplies rows and seconds; below 1 it only shows that everything runs
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// The number of rounds, of which the median is taken: 3 by default; with --compare 8, and at least 4, the fewest
    /// with which a difference can be told from noise
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: Option<u8>,
    /// Compare this checkout's build with that of BASE, a commit or a binary, by running the named scenarios with both in
    /// turns
    #[arg(long, value_name = "BASE")]
    compare: Option<String>,
    /// Also measure with ten million pending rows, with ten million dead ones, and what more daemons and partitions do; takes an
    /// hour and a half more
    #[arg(long)]
    big: bool,
    /// For how many minutes memory is watched
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,
}

impl Arguments {
    fn rounds(&self) -> u8 {
        self.rounds.unwrap_or(if self.compare.is_some() { compare::ROUNDS } else { 3 })
    }
}

/// The parameters of a run, and the stage that its scenarios share.
pub(crate) struct Bench {
    arguments: Arguments,
    /// The stage with the pending rows, which is kept because they take long to write.
    kept: RefCell<Option<Stage>>,
}

impl Bench {
    /// How many times each figure is measured in a run of a scenario. When builds are compared, every round is a run.
    pub(crate) fn rounds(&self) -> u8 {
        if self.arguments.compare.is_some() { 1 } else { self.arguments.rounds() }
    }

    /// `rows` multiplied by the scale, and at least 1,000.
    pub(crate) fn rows(&self, rows: u32) -> u32 {
        scaled(rows, self.arguments.scale).max(1_000)
    }

    /// `seconds` multiplied by the scale, and at least 2.
    pub(crate) fn seconds(&self, seconds: u32) -> u32 {
        scaled(seconds, self.arguments.scale).max(2)
    }

    /// `times` multiplied by the scale, and at least 2.
    pub(crate) fn times(&self, times: u32) -> u32 {
        scaled(times, self.arguments.scale).max(2)
    }

    /// Whether `--big` was given.
    pub(crate) fn big(&self) -> bool {
        self.arguments.big
    }

    /// How long memory is watched.
    pub(crate) fn minutes(&self) -> Duration {
        Duration::from_mins(1).mul_f64(self.arguments.minutes)
    }

    /// Takes the shared stage, with at least `rows` pending rows and all plugins.
    pub(crate) async fn take_pending_stage(&self, rows: u32) -> Stage {
        let kept = self.kept.take();
        let mut stage = match kept {
            Some(stage) => stage,
            None => Stage::with_plugins(&PLUGINS).await,
        };
        stage.write_pending(self.rows(rows)).await;
        stage
    }

    /// Keeps the stage for the next scenario.
    pub(crate) fn keep_stage(&self, stage: Stage) {
        self.kept.replace(Some(stage));
    }

    /// Removes the shared stage, if there is one.
    async fn remove_kept_stage(&self) {
        let kept = self.kept.take();
        if let Some(stage) = kept {
            stage.remove().await;
        }
    }

    /// Writes `report` into the file that was asked for, if any.
    fn write_json(&self, report: &Value) -> anyhow::Result<()> {
        let Some(file) = &self.arguments.json else { return Ok(()) };
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(file, json).with_context(|| format!("could not write {}", file.display()))
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float becomes the nearest that fits")]
fn scaled(number: u32, scale: f64) -> u32 {
    (f64::from(number) * scale).round() as u32
}

#[tokio::main]
async fn main() -> ExitCode {
    match measure(Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("measure: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the scenarios, and returns whether all of them ran to their end.
async fn measure(arguments: Arguments) -> anyhow::Result<bool> {
    if arguments.list {
        for Scenario { name, description, .. } in &SCENARIOS {
            println!("{name:<16} {description}");
        }
        return Ok(true);
    }
    if let Some(unknown) = arguments.scenarios.iter().find(|name| SCENARIOS.iter().all(|known| known.name != **name)) {
        anyhow::bail!("there is no scenario {unknown:?}; --list shows them all");
    }
    // Read before this program causes load itself.
    let load = probe::load_average();
    let base = arguments.compare.as_deref().map(|base| Base::prepare(base, &arguments)).transpose()?;
    eprintln!("building the daemon and the plugins, and starting a private PostgreSQL and RabbitMQ ...");
    let servers = tokio::task::spawn_blocking(|| Servers::start_private_with(SETTINGS))
        .await?
        .context("could not start the servers")?;
    harness::world::share_servers(servers);

    let mut circumstances = probe::circumstances(load).await;
    let (Arguments { scale, minutes, .. }, rounds) = (&arguments, arguments.rounds());
    circumstances.0.push(("sizes", format!("{rounds} rounds, {minutes} minutes of memory, scale {scale}")));
    let bench = Bench { arguments, kept: RefCell::default() };
    if let Some(base) = base {
        return compare::compare(&bench, base, circumstances).await;
    }
    let mut report = Report::begin(circumstances);
    for Scenario { name, description, run, .. } in
        SCENARIOS.iter().filter(|scenario| scenario.is_wanted(&bench.arguments))
    {
        eprintln!("measuring {name} ...");
        let begun = Instant::now();
        let result = catch(run(&bench)).await;
        report.add(name, description, begun.elapsed(), result);
        // Written after each scenario, so that an interrupted run leaves the figures so far.
        bench.write_json(&report.json())?;
    }
    Ok(report.end())
}

impl Scenario {
    fn is_wanted(&self, arguments: &Arguments) -> bool {
        if arguments.scenarios.is_empty() {
            self.part == Part::Targets || self.part == Part::Big && arguments.big
        } else {
            arguments.scenarios.iter().any(|name| name == self.name)
        }
    }
}

/// The figures of a run, or the message of the panic that ended it.
async fn catch(run: impl Future<Output = Vec<Figure>>) -> Result<Vec<Figure>, String> {
    AssertUnwindSafe(run).catch_unwind().await.map_err(|panic| panic_message(&*panic))
}

/// The message of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "it panicked; see standard error".to_owned())
}
