//! The list of the scenarios. Must never measure anything itself.

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

use crate::report::Figure;
use crate::{
    Bench, calls, drain, enqueue, failover, grow, intake, lateness, limits, plugins, recurrences, replay, resources,
    settings, sizes, trouble,
};

/// A scenario, which measures one or more figures.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    pub(crate) part: Part,
    pub(crate) run: for<'a> fn(&'a Bench) -> LocalBoxFuture<'a, Vec<Figure>>,
}

/// When a scenario is measured without being named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Always, because it has targets.
    Targets,
    /// With `--big` only.
    Big,
    /// Never by default: the scenario has no targets.
    Further,
}

/// The scenarios, in the order in which they run: those that share the pending rows need more and more of them.
pub(crate) const SCENARIOS: [Scenario; 30] = [
    Scenario {
        name: "drain",
        description: "100,000 rows already due, through a wasm plugin, to a quorum queue",
        part: Part::Targets,
        run: |bench| drain::drain(bench).boxed_local(),
    },
    Scenario {
        name: "sizes",
        description: "rows with bodies of 400 bytes to 16 MiB",
        part: Part::Targets,
        run: |bench| sizes::sizes(bench).boxed_local(),
    },
    Scenario {
        name: "two",
        description: "the same by two daemons on one database",
        part: Part::Targets,
        run: |bench| drain::two_daemons(bench).boxed_local(),
    },
    Scenario {
        name: "recovery",
        description: "kill -9 in the middle of the same, and a restart",
        part: Part::Targets,
        run: |bench| drain::recovery(bench).boxed_local(),
    },
    Scenario {
        name: "reader",
        description: "500,000 rows delivered while a transaction keeps its snapshot",
        part: Part::Targets,
        run: |bench| drain::with_reader(bench).boxed_local(),
    },
    Scenario {
        name: "due-now",
        description: "rows one at a time, due when they are written",
        part: Part::Targets,
        run: |bench| lateness::due_now(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-100",
        description: "100 rows a second due for a minute, 200,000 pending",
        part: Part::Targets,
        run: |bench| lateness::at_100_rows_per_second(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-1000",
        description: "1,000 rows a second due for a minute, a million pending",
        part: Part::Targets,
        run: |bench| lateness::at_1000_rows_per_second(bench).boxed_local(),
    },
    Scenario {
        name: "spike",
        description: "50,000 rows due in the same millisecond, a million pending, other kinds trickling",
        part: Part::Targets,
        run: |bench| lateness::spike(bench).boxed_local(),
    },
    Scenario {
        name: "limits",
        description: "20,000 rows at 500 a second, 200 subjects with limits of their own, and other kinds beside a million limited rows",
        part: Part::Targets,
        run: |bench| limits::limits(bench).boxed_local(),
    },
    Scenario {
        name: "recurrences",
        description: "500 recurrences that come each second, and 500 ordinary rows a second",
        part: Part::Targets,
        run: |bench| recurrences::lateness(bench).boxed_local(),
    },
    Scenario {
        name: "intake",
        description: "messages that are published to an intake: 60,000 and a million waiting, and delayed by nothing and by 1 s",
        part: Part::Targets,
        run: |bench| intake::intake(bench).boxed_local(),
    },
    Scenario {
        name: "lateness-big",
        description: "1,000 rows a second due for a minute, ten million pending",
        part: Part::Big,
        run: |bench| lateness::with_ten_million_pending(bench).boxed_local(),
    },
    Scenario {
        name: "start",
        description: "start to ready with a warm cache, a million pending (ten with --big)",
        part: Part::Targets,
        run: |bench| resources::start(bench).boxed_local(),
    },
    Scenario {
        name: "memory",
        description: "deliveries for --minutes, a million pending (ten with --big), all plugins loaded",
        part: Part::Targets,
        run: |bench| resources::memory(bench).boxed_local(),
    },
    Scenario {
        name: "idle",
        description: "a minute with a row due tomorrow, and one with 10,000 recurrences as well",
        part: Part::Targets,
        run: |bench| resources::idle(bench).boxed_local(),
    },
    Scenario {
        name: "lonely",
        description: "100 rows a second that come alone, due when they are written",
        part: Part::Targets,
        run: |bench| resources::lonely(bench).boxed_local(),
    },
    Scenario {
        name: "enqueue",
        description: "a million far-future rows in bulk, and 16 clients with single rows due soon",
        part: Part::Targets,
        run: |bench| enqueue::enqueue(bench).boxed_local(),
    },
    Scenario {
        name: "held-xmin",
        description: "50 rows a second over three million dead ones (and over ten with --big) that an open transaction keeps",
        part: Part::Targets,
        run: |bench| trouble::held_xmin(bench).boxed_local(),
    },
    Scenario {
        name: "freeze",
        description: "rows of two kinds beside a daemon that is frozen, thawed and killed, and leaves rows that nobody serves",
        part: Part::Targets,
        run: |bench| trouble::freeze(bench).boxed_local(),
    },
    Scenario {
        name: "failover",
        description: "20 failovers of PostgreSQL to a standby, and 20 of RabbitMQ to other nodes, while rows fall due",
        part: Part::Targets,
        run: |bench| failover::failover(bench).boxed_local(),
    },
    Scenario {
        name: "grow",
        description: "drains by one to eight daemons, with one to sixteen partitions and ten million pending",
        part: Part::Big,
        run: |bench| grow::grow(bench).boxed_local(),
    },
    Scenario {
        name: "wasm",
        description: "a call of a plugin in Rust",
        part: Part::Targets,
        run: |bench| calls::wasm(bench).boxed_local(),
    },
    Scenario {
        name: "settings",
        description: "the drain without a part of the history, without any, and without waiting for the disk",
        part: Part::Further,
        run: |bench| settings::settings(bench).boxed_local(),
    },
    Scenario {
        name: "languages",
        description: "calls of plugins in JavaScript and Python",
        part: Part::Further,
        run: |bench| calls::languages(bench).boxed_local(),
    },
    Scenario {
        name: "replay",
        description: "a pass over 100,000 dead letters of 1 KiB",
        part: Part::Further,
        run: |bench| replay::replay(bench).boxed_local(),
    },
    Scenario {
        name: "first-message",
        description: "a plugin's file to its first message, 20 times",
        part: Part::Further,
        run: |bench| plugins::first_message(bench).boxed_local(),
    },
    Scenario {
        name: "swaps",
        description: "2,000 rows a second while their plugin is replaced 50 times, each row once",
        part: Part::Further,
        run: |bench| plugins::swaps(bench).boxed_local(),
    },
    Scenario {
        name: "neighbours",
        description: "a row every 25 ms, beside a plugin that spins until its limit, and with a million held rows",
        part: Part::Further,
        run: |bench| plugins::neighbours(bench).boxed_local(),
    },
    Scenario {
        name: "replacements",
        description: "a plugin's file replaced 1,000 times",
        part: Part::Further,
        run: |bench| plugins::replacements(bench).boxed_local(),
    },
];
