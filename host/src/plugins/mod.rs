//! Plugins: loads WebAssembly components from the plugin directory, and calls them to turn due rows into events. The
//! only folder that uses wasmtime.
//!
//! ```text
//!   directory ──look, settle──▶ Source ──inspect, compile, link, describe──▶ Plugin ──Registry──▶ PluginSet
//!       ▲ watcher                                                              (a generation)        │ one swap
//!                                                                                                    ▼
//!   rows of one claim ──by kind──▶ breaker ──▶ one store per plugin ──build──▶ BuiltEvent or BuildError
//! ```
//!
//! Must never trust a plugin: its time, memory, stack, output and log lines are limited, and nothing that it can import
//! reaches outside. A failed call is counted against the row that was being built, never against another row.
//!
//! | module | for |
//! | --- | --- |
//! | `loading` | from a file in the plugin directory to compiled code |
//! | `generation` | one loaded version of a plugin: builds events, and has a breaker for each kind |
//! | `registry` | which generations serve; reloading and rolling back |
//! | `runtime` | the wasmtime engine, the interfaces that plugins may import, limits, one call |
//! | `state` | the state directory: compiled code, versions to roll back to, quarantined versions |
//!
//! # How a plugin is replaced
//!
//! 1. A file event wakes the watcher, which looks at the directory. It looks again 20 ms later and sees the same: the
//!    file has settled, it is not being written any more.
//! 2. The file is read; a change during the read is noticed. If there is a list `allowed.sha256`, it must contain the
//!    digest. The file's sections are counted and its imports are compared by name before anything is compiled.
//! 3. A child process, `/proc/self/exe plugin compile`, compiles the file into wasmtime's cache, under limits of
//!    memory, CPU time and wall-clock time. The daemon takes the code from the cache, links it, and calls `describe`
//!    under the plugin's limits.
//! 4. The registry checks that no other file serves one of its kinds, replaces the whole [`PluginSet`] with one
//!    `ArcSwap::store`, and wakes the scheduler. The listener announces the kinds that are new and withdraws those that
//!    are gone.
//! 5. If a step fails, the registry keeps the reason for `tidings plugin list`, and the generation that served goes on.
//! 6. When the new generation first answers for a row of a kind, its bytes are kept as the version to roll back to for
//!    that kind. When a kind's breaker opens within the kind's first hundred calls, the version that was kept before
//!    serves again, and the new version is quarantined.

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
pub use loading::compile::{CODE_NOT_CACHED, compile_in_this_process};
pub use loading::inspect::{World, inspect};
pub use loading::load_error::LoadError;
pub use loading::settings::Settings;
pub use registry::watcher::{try_watch, watch};
pub use registry::{GenerationStatus, KindStatus, PluginStatus, Registry};
pub use runtime::engine::{Engine, EngineError, Metering};
pub use runtime::limits::Limits;
pub use state::{StateDir, StateError};

/// How long building the rows of one claim may take. It is limited because the claim holds the rows' locks. Rows that
/// were not reached stay due.
const BUILD_BUDGET: Duration = Duration::from_secs(2);
/// How long each plugin may build if a claim has rows of several plugins. Their messages are published together, so a
/// slow plugin delays the others by at most this time and one of its own calls.
const SHARED_BUDGET: Duration = Duration::from_millis(50);
/// How many bytes of message bodies one claim may build. Rows that were not reached stay due.
const BODY_BUDGET_BYTES: usize = 4 * 1024 * 1024;

/// The plugins that serve, by kind. The set never changes: a claim uses one set from beginning to end.
#[derive(Debug, Default)]
pub struct PluginSet {
    by_kind: BTreeMap<String, Arc<Plugin>>,
    kinds: Vec<String>,
}

/// One row of a claim after the build.
#[derive(Debug)]
pub struct Build {
    /// The row.
    pub schedule: Schedule,
    /// The plugin that serves the row's kind.
    pub plugin: Arc<Plugin>,
    /// The event, or why there is none; `None` = the time or the bytes of the claim were used up before this row.
    pub outcome: Option<Result<BuiltEvent, BuildError>>,
    /// When the outcome was known.
    pub at: Instant,
}

/// Counts the plugin files in `dir`, whether they could serve or not.
///
/// # Errors
///
/// When the directory cannot be read.
pub fn count_files(dir: &Path) -> std::io::Result<usize> {
    loading::directory::look(dir).map(|files| files.len())
}

impl PluginSet {
    /// Makes the set of `plugins`, of which no two may serve the same kind.
    #[must_use]
    pub fn of(plugins: impl IntoIterator<Item = Arc<Plugin>>) -> Self {
        let mut by_kind = BTreeMap::new();
        for plugin in plugins {
            by_kind.extend(plugin.kinds().keys().map(|kind| (kind.clone(), Arc::clone(&plugin))));
        }
        Self { kinds: by_kind.keys().cloned().collect(), by_kind }
    }

    /// The same set, with kinds that the daemon serves without a plugin.
    #[must_use]
    pub fn with_built_in(mut self, kinds: &[String]) -> Self {
        self.kinds.extend(kinds.iter().cloned());
        self.kinds.sort();
        self
    }

    /// The kinds that are served, in alphabetical order.
    #[must_use]
    pub fn kinds(&self) -> &[String] {
        &self.kinds
    }

    /// Builds the events of `rows`, which are of kinds that plugins serve. The plugins run concurrently, so a slow plugin delays only its own rows.
    pub async fn build(&self, rows: Vec<Schedule>, clock: DatabaseClock) -> Vec<Build> {
        let body_bytes_left = Arc::new(AtomicUsize::new(BODY_BUDGET_BYTES));
        let mut by_plugin: BTreeMap<&Path, (Arc<Plugin>, Vec<Schedule>)> = BTreeMap::new();
        for row in rows {
            // The claim asks only for kinds that are served. Its rows of other kinds are past their deadline, and are
            // not passed here.
            let Some(plugin) = self.by_kind.get(&row.kind) else { continue };
            by_plugin.entry(plugin.file()).or_insert_with(|| (Arc::clone(plugin), Vec::new())).1.push(row);
        }
        let until = Instant::now() + if by_plugin.len() > 1 { SHARED_BUDGET } else { BUILD_BUDGET };
        let builds = by_plugin
            .into_values()
            .map(|(plugin, rows)| plugin.build(rows, clock, until, Arc::clone(&body_bytes_left)));
        join_all(builds).await.into_iter().flatten().collect()
    }
}
