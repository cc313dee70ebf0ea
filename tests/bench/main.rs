//! `cargo measure`: how fast and how punctual the daemon is, each figure beside its limit or rival in the same run and its
//! target. The servers are our own, with the settings that their users have. What each line means is in README.md.

mod calls;
mod drain;
mod enqueue;
mod lateness;
mod load;
mod plugins;
mod probe;
mod raw;
mod replay;
mod report;
mod resources;
mod sizes;
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
use futures_util::future::LocalBoxFuture;
use harness::servers::Servers;

use load::Stage;
use report::{Figure, Report};

/// As the daemon has it, so that what it is compared with has no other.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub(crate) const MILLION: u32 = 1_000_000;
/// What the worlds of most scenarios have in their plugin directory: all of the repository.
const PLUGINS: [&str; 3] = ["message", "game-reminder", "game-status"];
/// As users have it, and with what counts statements, which does so only where it is asked to.
const SETTINGS: &str = "fsync = on\nshared_preload_libraries = 'pg_stat_statements'\npg_stat_statements.track = none";

/// Measures Tidings on servers of its own
#[derive(Debug, Parser)]
#[command(name = "cargo measure --")]
struct Arguments {
    /// What to measure; all of the table of targets, if nothing is named
    scenarios: Vec<String>,
    /// Say what there is
    #[arg(long)]
    list: bool,
    /// Write every figure, with each round, into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Parts of the rows and seconds, to see that everything runs; what comes of less than 1 says little
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Rounds, of which the median is taken
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Ten million pending rows, where one is enough otherwise, and ten million dead ones; takes half an hour more
    #[arg(long)]
    big: bool,
    /// For how long memory is watched
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,
}

/// Something to be measured.
struct Scenario {
    name: &'static str,
    what: &'static str,
    part: Part,
    run: for<'a> fn(&'a Bench) -> LocalBoxFuture<'a, Vec<Figure>>,
}

/// When a scenario is played without being named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Always: it has targets.
    Targets,
    /// With `--big`.
    Big,
    /// Never.
    Further,
}

/// In this order: what shares the pending rows goes from few to many.
const SCENARIOS: [Scenario; 23] = [
    Scenario {
        name: "drain",
        what: "100,000 rows already due, through a wasm plugin, to a quorum queue",
        part: Part::Targets,
        run: |bench| drain::drain(bench).boxed_local(),
    },
    Scenario {
        name: "sizes",
        what: "rows with bodies of 400 bytes to 16 MiB",
        part: Part::Targets,
        run: |bench| sizes::sizes(bench).boxed_local(),
    },
    Scenario {
        name: "two",
        what: "the same by two daemons on one database",
        part: Part::Targets,
        run: |bench| drain::two(bench).boxed_local(),
    },
    Scenario {
        name: "recovery",
        what: "kill -9 in the middle of the same, and a restart",
        part: Part::Targets,
        run: |bench| drain::recovery(bench).boxed_local(),
    },
    Scenario {
        name: "reader",
        what: "500,000 rows delivered while a transaction keeps its snapshot",
        part: Part::Targets,
        run: |bench| drain::reader(bench).boxed_local(),
    },
    Scenario {
        name: "due-now",
        what: "rows one at a time, due when they are written",
        part: Part::Targets,
        run: |bench| lateness::due_now(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-100",
        what: "100 rows a second due for a minute, 200,000 pending",
        part: Part::Targets,
        run: |bench| lateness::quiet(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-1000",
        what: "1,000 rows a second due for a minute, a million pending",
        part: Part::Targets,
        run: |bench| lateness::busy(bench).boxed_local(),
    },
    Scenario {
        name: "spike",
        what: "50,000 rows due in the same millisecond, a million pending, other kinds trickling",
        part: Part::Targets,
        run: |bench| lateness::spike(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-big",
        what: "1,000 rows a second due for a minute, ten million pending",
        part: Part::Big,
        run: |bench| lateness::vast(bench).boxed_local(),
    },
    Scenario {
        name: "start",
        what: "start to ready with a warm cache, a million pending (ten with --big)",
        part: Part::Targets,
        run: |bench| resources::start(bench).boxed_local(),
    },
    Scenario {
        name: "memory",
        what: "deliveries for --minutes, a million pending (ten with --big), all plugins loaded",
        part: Part::Targets,
        run: |bench| resources::memory(bench).boxed_local(),
    },
    Scenario {
        name: "idle",
        what: "a minute with a row due tomorrow",
        part: Part::Targets,
        run: |bench| resources::idle(bench).boxed_local(),
    },
    Scenario {
        name: "enqueue",
        what: "a million far-future rows in bulk, and 16 clients with single rows due soon",
        part: Part::Targets,
        run: |bench| enqueue::enqueue(bench).boxed_local(),
    },
    Scenario {
        name: "held-xmin",
        what: "50 rows a second over three million dead ones (and over ten with --big) that an open transaction keeps",
        part: Part::Targets,
        run: |bench| trouble::held_xmin(bench).boxed_local(),
    },
    Scenario {
        name: "freeze",
        what: "rows of two kinds beside a daemon that is frozen, thawed and killed, and leaves rows that nobody serves",
        part: Part::Targets,
        run: |bench| trouble::freeze(bench).boxed_local(),
    },
    Scenario {
        name: "wasm",
        what: "a call of a plugin in Rust",
        part: Part::Targets,
        run: |bench| calls::wasm(bench).boxed_local(),
    },
    Scenario {
        name: "languages",
        what: "calls of plugins in JavaScript and Python",
        part: Part::Further,
        run: |bench| calls::languages(bench).boxed_local(),
    },
    Scenario {
        name: "replay",
        what: "a pass over 100,000 dead letters of 1 KiB",
        part: Part::Further,
        run: |bench| replay::replay(bench).boxed_local(),
    },
    Scenario {
        name: "first-message",
        what: "a plugin's file to its first message, 20 times",
        part: Part::Further,
        run: |bench| plugins::first_message(bench).boxed_local(),
    },
    Scenario {
        name: "swaps",
        what: "2,000 rows a second while their plugin is replaced 50 times, each row once",
        part: Part::Further,
        run: |bench| plugins::swaps(bench).boxed_local(),
    },
    Scenario {
        name: "neighbours",
        what: "a row every 25 ms, beside a plugin that spins until its limit, and with a million held rows",
        part: Part::Further,
        run: |bench| plugins::neighbours(bench).boxed_local(),
    },
    Scenario {
        name: "replacements",
        what: "a plugin's file replaced 1,000 times",
        part: Part::Further,
        run: |bench| plugins::replacements(bench).boxed_local(),
    },
];

/// How a run is shaped, and what its scenarios share.
pub(crate) struct Bench {
    arguments: Arguments,
    /// The stage with the rows that wait, which take long to write.
    kept: RefCell<Option<Stage>>,
}

impl Bench {
    /// How often each figure is taken.
    pub(crate) fn rounds(&self) -> u8 {
        self.arguments.rounds
    }

    /// So many rows, by the scale.
    pub(crate) fn rows(&self, rows: u32) -> u32 {
        scaled(rows, self.arguments.scale).max(1_000)
    }

    /// So many seconds, by the scale.
    pub(crate) fn seconds(&self, seconds: u32) -> u32 {
        scaled(seconds, self.arguments.scale).max(2)
    }

    /// Whether what is large is to be larger.
    pub(crate) fn big(&self) -> bool {
        self.arguments.big
    }

    /// How long memory is watched.
    pub(crate) fn minutes(&self) -> Duration {
        Duration::from_mins(1).mul_f64(self.arguments.minutes)
    }

    /// A stage on which at least so many rows wait, with all plugins.
    pub(crate) async fn pending(&self, rows: u32) -> Stage {
        let kept = self.kept.take();
        let mut stage = match kept {
            Some(stage) => stage,
            None => Stage::with(&PLUGINS).await,
        };
        stage.pend(self.rows(rows)).await;
        stage
    }

    /// Leaves it for the next scenario.
    pub(crate) fn keep(&self, stage: Stage) {
        self.kept.replace(Some(stage));
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

/// Measures, and says whether every scenario ran to its end.
async fn measure(arguments: Arguments) -> anyhow::Result<bool> {
    if arguments.list {
        for Scenario { name, what, .. } in &SCENARIOS {
            println!("{name:<16} {what}");
        }
        return Ok(true);
    }
    if let Some(unknown) = arguments.scenarios.iter().find(|name| SCENARIOS.iter().all(|known| known.name != **name)) {
        anyhow::bail!("there is no {unknown:?}; --list says what there is");
    }
    // Before we are at work ourselves.
    let load = probe::load_average();
    eprintln!("building the daemon and the plugins, and starting a PostgreSQL and a RabbitMQ of our own ...");
    let servers = tokio::task::spawn_blocking(|| Servers::with(SETTINGS)).await?.context("servers of our own")?;
    harness::world::share(servers);

    let mut circumstances = probe::circumstances(load).await;
    let Arguments { scale, rounds, minutes, .. } = arguments;
    circumstances.push(("sizes", format!("{rounds} rounds, {minutes} minutes of memory, scale {scale}")));
    let mut report = Report::begin(circumstances);
    let bench = Bench { arguments, kept: RefCell::default() };
    for Scenario { name, what, run, .. } in SCENARIOS.iter().filter(|scenario| scenario.is_wanted(&bench.arguments)) {
        eprintln!("measuring {name} ...");
        let begun = Instant::now();
        let came_to = AssertUnwindSafe(run(&bench)).catch_unwind().await.map_err(|panic| sentence(&*panic));
        report.add(name, what, begun.elapsed(), came_to);
        if let Some(file) = &bench.arguments.json {
            // Each time: whoever stops us has what there is.
            let json = serde_json::to_string_pretty(&report.json())?;
            std::fs::write(file, json).with_context(|| format!("could not write {}", file.display()))?;
        }
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

/// What a panic said.
fn sentence(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.filter(|text| !text.is_empty()).unwrap_or_else(|| "it panicked; standard error says where".to_owned())
}
