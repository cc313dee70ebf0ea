//! The only place with wasmtime: plugins, and what they make of rows.
//!
//! ```text
//!   NAME.wasm ──read──▶ bytes ──compile──▶ component ──link──▶ pre-instance ──describe──▶ Plugin ──▶ PluginSet
//!                                                                                           │
//!   rows of one claim ──by kind──▶ one store per plugin, dropped on any error ──build──▶ BuiltEvent or BuildError
//! ```
//!
//! A plugin is never trusted: its time, memory, stack, output and log lines are limited, and it is linked with nothing
//! that reaches outside. What it does wrong is the fault of the row it was asked for, never of another.

mod bindings;
mod check;
mod engine;
mod guest;
mod instance;
mod limits;
mod plugin;
mod settings;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use futures_util::future::join_all;
use thiserror::Error;
use tokio::time::Instant;

use crate::clock::DatabaseClock;
use crate::event::{BuildError, BuiltEvent};
use crate::schedule::Schedule;

pub use check::LoadError;
pub use engine::{Engine, EngineError};
pub use plugin::Plugin;

/// How long the rows of one claim may take to build. Those that were not reached stay due: the claim holds locks.
const BUILD_BUDGET: Duration = Duration::from_secs(2);
/// The bodies that one claim may build, in bytes. Rows that were not reached stay due.
const BODY_BUDGET: usize = 8 * 1024 * 1024;

/// A plugin file that is not served, and why.
#[derive(Debug, Error)]
#[error("refused the plugin {}", .file.display())]
pub struct Refused {
    /// The file.
    pub file: PathBuf,
    /// Why.
    #[source]
    pub reason: LoadError,
}

/// The plugins that serve, by kind. Immutable: a claim uses one set from beginning to end.
#[derive(Debug, Default)]
pub struct PluginSet {
    by_kind: BTreeMap<String, Arc<Plugin>>,
}

/// One row after its build: what became of it, or `None` if there was no time left for it.
#[derive(Debug)]
pub struct Build {
    /// The row.
    pub schedule: Schedule,
    /// `name@version+digest8` of the plugin.
    pub plugin: String,
    /// What became of it.
    pub outcome: Option<Result<BuiltEvent, BuildError>>,
}

impl PluginSet {
    /// Loads every `.wasm` file that lies directly in `dir`, in the order of their names, and none whose name begins
    /// with a dot. A file that cannot be served is refused and does not disturb the others.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub async fn load(engine: &Arc<Engine>, dir: &Path) -> std::io::Result<(Self, Vec<Refused>)> {
        let mut set = Self::default();
        let mut refused = Vec::new();
        for file in plugin_files(dir)? {
            let loaded = Plugin::load(engine, &file).await.and_then(|plugin| set.add(plugin));
            if let Err(reason) = loaded {
                refused.push(Refused { file, reason });
            }
        }
        Ok((set, refused))
    }

    fn add(&mut self, plugin: Plugin) -> Result<(), LoadError> {
        for kind in plugin.kinds() {
            if let Some(other) = self.by_kind.get(kind) {
                return Err(LoadError::KindTaken { kind: kind.clone(), by: other.file().to_owned() });
            }
        }
        let plugin = Arc::new(plugin);
        self.by_kind.extend(plugin.kinds().iter().map(|kind| (kind.clone(), Arc::clone(&plugin))));
        Ok(())
    }

    /// The kinds that are served, in alphabetical order.
    #[must_use]
    pub fn kinds(&self) -> Vec<String> {
        self.by_kind.keys().cloned().collect()
    }

    /// The plugins, without repetition, in the order of their files.
    #[must_use]
    pub fn plugins(&self) -> Vec<Arc<Plugin>> {
        let mut plugins: Vec<Arc<Plugin>> = self.by_kind.values().map(Arc::clone).collect();
        plugins.sort_by(|one, other| one.file().cmp(other.file()));
        plugins.dedup_by(|one, other| one.file() == other.file());
        plugins
    }

    /// Builds the events of `rows`. Plugins work side by side: a slow one delays its own rows only.
    pub async fn build(&self, rows: Vec<Schedule>, clock: DatabaseClock) -> Vec<Build> {
        let until = Instant::now() + BUILD_BUDGET;
        let bodies = Arc::new(AtomicUsize::new(BODY_BUDGET));
        let mut by_plugin: BTreeMap<&Path, (Arc<Plugin>, Vec<Schedule>)> = BTreeMap::new();
        for row in rows {
            // The claim asks for served kinds only; a row of another one is past its deadline, and not here.
            let Some(plugin) = self.by_kind.get(&row.kind) else { continue };
            by_plugin.entry(plugin.file()).or_insert_with(|| (Arc::clone(plugin), Vec::new())).1.push(row);
        }
        let builds =
            by_plugin.into_values().map(|(plugin, rows)| plugin.build(rows, clock, until, Arc::clone(&bodies)));
        join_all(builds).await.into_iter().flatten().collect()
    }
}

/// The candidates in `dir`, sorted by name.
fn plugin_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "wasm") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
