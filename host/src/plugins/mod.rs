//! The only place with wasmtime: plugins, and what they make of rows.
//!
//! ```text
//!   directory ──look, settle──▶ Source ──inspect, compile, link, describe──▶ Plugin ──Registry──▶ PluginSet
//!       ▲ watcher                                                              (a generation)        │ one swap
//!                                                                                                    ▼
//!   rows of one claim ──by kind──▶ breaker ──▶ one store per plugin ──build──▶ BuiltEvent or BuildError
//! ```
//!
//! A plugin is never trusted: its time, memory, stack, output and log lines are limited, and it is linked with nothing
//! that reaches outside. What it does wrong is the fault of the row it was asked for, never of another.

mod generation;
mod loading;
mod registry;
mod runtime;
mod state;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use crate::model::clock::DatabaseClock;
use crate::model::event::{BuildError, BuiltEvent};
use crate::model::schedule::Schedule;

pub use generation::breaker::BreakerState;
pub use generation::{Kind, Plugin, TestRun};
pub use loading::allowlist::Allowlist;
pub use loading::check::{check_description, check_world};
pub use loading::compile::{CODE_NOT_CACHED, compile_here};
pub use loading::inspect::{World, inspect};
pub use loading::load_error::LoadError;
pub use loading::settings::Settings;
pub use registry::watcher::{try_watch, watch};
pub use registry::{GenerationStatus, KindStatus, PluginStatus, Registry};
pub use runtime::engine::{Engine, EngineError, Metering};
pub use runtime::limits::Limits;
pub use state::{StateDir, StateError};

/// How long the rows of one claim may take to build. Those that were not reached stay due: the claim holds locks.
const BUILD_BUDGET: Duration = Duration::from_secs(2);
/// The same for each plugin, if rows of several are in one claim: they are published together, and a slow plugin must
/// not keep the others waiting for more than this and one call of its own.
const SHARED_BUDGET: Duration = Duration::from_millis(50);
/// The bodies that one claim may build, in bytes. Rows that were not reached stay due.
const BODY_BUDGET: usize = 4 * 1024 * 1024;

/// The plugins that serve, by kind. Immutable: a claim uses one set from beginning to end.
#[derive(Debug, Default)]
pub struct PluginSet {
    by_kind: BTreeMap<String, Arc<Plugin>>,
    kinds: Vec<String>,
}

/// One row after its build: what became of it, or `None` if there was no time left for it.
#[derive(Debug)]
pub struct Build {
    /// The row.
    pub schedule: Schedule,
    /// The plugin that was asked.
    pub plugin: Arc<Plugin>,
    /// What became of it.
    pub outcome: Option<Result<BuiltEvent, BuildError>>,
    /// When that was known.
    pub at: Instant,
}

/// How many plugins lie in `dir`, whether they serve or not.
///
/// # Errors
///
/// When it cannot be read.
pub fn count_files(dir: &Path) -> std::io::Result<usize> {
    loading::directory::look(dir).map(|seen| seen.len())
}

impl PluginSet {
    /// The set of these plugins; no two of them serve the same kind.
    #[must_use]
    pub fn of(plugins: impl IntoIterator<Item = Arc<Plugin>>) -> Self {
        let mut by_kind = BTreeMap::new();
        for plugin in plugins {
            by_kind.extend(plugin.kinds().keys().map(|kind| (kind.clone(), Arc::clone(&plugin))));
        }
        Self { kinds: by_kind.keys().cloned().collect(), by_kind }
    }

    /// The kinds that are served, in alphabetical order.
    #[must_use]
    pub fn kinds(&self) -> &[String] {
        &self.kinds
    }

    /// Builds the events of `rows`. Plugins work side by side: a slow one delays its own rows only.
    pub async fn build(&self, rows: Vec<Schedule>, clock: DatabaseClock) -> Vec<Build> {
        let bodies = Arc::new(AtomicUsize::new(BODY_BUDGET));
        let mut by_plugin: BTreeMap<&Path, (Arc<Plugin>, Vec<Schedule>)> = BTreeMap::new();
        for row in rows {
            // The claim asks for served kinds only; a row of another one is past its deadline, and not here.
            let Some(plugin) = self.by_kind.get(&row.kind) else { continue };
            by_plugin.entry(plugin.file()).or_insert_with(|| (Arc::clone(plugin), Vec::new())).1.push(row);
        }
        let until = Instant::now() + if by_plugin.len() > 1 { SHARED_BUDGET } else { BUILD_BUDGET };
        let builds =
            by_plugin.into_values().map(|(plugin, rows)| plugin.build(rows, clock, until, Arc::clone(&bodies)));
        join_all(builds).await.into_iter().flatten().collect()
    }
}
