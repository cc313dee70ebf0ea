//! The registry: which generations serve. It follows the plugin directory: loads files that are new or have changed,
//! and stops serving files that are gone.
//!
//! Must never change which generations serve when a reload fails: if a file cannot serve, the generation that served
//! from it before goes on. The allowlist is the one exception: a generation whose digest is not on it any more is
//! stopped.
//!
//! To change it, know that
//!
//! - only `Registry::admit` lets a generation serve, after everything about the generation has succeeded;
//! - each change replaces the whole [`PluginSet`] at once. A batch uses the set with which it began, and the
//!   generations in that set live until the batch ends;
//! - only the watcher's task changes the registry, and every other task only reads it;
//! - files are read and compiled concurrently, but admitted one after the other in the order of their names. So if two
//!   files serve the same kind when the daemon starts, it is always the first by name that serves;
//! - file events are hints. A file counts as written when two looks in a row have seen the same, and the watcher looks
//!   every 5 s without a hint.

mod loading;
mod rollback;
mod status;
pub(in crate::plugins) mod watcher;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use futures_util::StreamExt as _;
use tidings_core::reason::Reason;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::model::health::Health;
use crate::model::wake::Wake;
use crate::plugins::PluginSet;
use crate::plugins::generation::Plugin;
use crate::plugins::generation::breaker::BreakerState;
use crate::plugins::loading::directory::{FileStats, SettleTracker, look};
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::Identity;
use crate::plugins::runtime::engine::Engine;
use crate::plugins::state::{StateDir, VersionStore};
use crate::telemetry::{Reload, count_reload, serve};

use loading::Prepared;

pub use status::{GenerationStatus, KindStatus, PluginStatus};

/// How many files are read and loaded concurrently. All of them are in memory at the same time. The engine decides how
/// many of them are compiled at the same time.
const MAX_PREPARING: usize = 16;

/// The plugins of one directory.
#[expect(missing_debug_implementations, reason = "the engine has none")]
pub struct Registry {
    engine: Arc<Engine>,
    dir: PathBuf,
    versions: VersionStore,
    /// The kinds that the daemon serves without a plugin.
    built_in: Vec<String>,
    set: ArcSwap<PluginSet>,
    kinds: watch::Sender<Vec<String>>,
    /// Whether each file that was in the directory when the daemon started has been loaded or refused.
    complete: watch::Sender<bool>,
    /// Wakes the scheduler when the set has changed.
    wake: Arc<Wake>,
    /// Wakes the watcher when a plugin has feedback, or a file in the directory has changed.
    pub(super) feedback_wake: Arc<Wake>,
    health: Arc<Health>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    settle_tracker: SettleTracker,
    by_file: BTreeMap<String, Slot>,
    last_generation: u64,
    dir_problem: Option<String>,
}

/// One file of the directory.
#[derive(Debug, Default)]
struct Slot {
    /// The file as it was seen when it was last loaded or refused.
    stats: Option<FileStats>,
    /// The generation that serves; `None` = nothing from this file serves.
    active: Option<Arc<Plugin>>,
    /// Why the file's present version does not serve, and the identity of that version. The identity is `None` if
    /// another attempt with the same bytes may end differently.
    problem: Option<(String, Option<Identity>)>,
    /// Whether the file was refused only because another file serves one of its kinds.
    waits_for_kind: bool,
}

impl Registry {
    /// Makes a registry of the plugins in `dir`, of which none is loaded yet. The kinds in `built_in` are served without a
    /// plugin. `wake` is woken whenever the set has changed; `health` gets a note while `state` cannot be written.
    #[must_use]
    pub fn new(
        engine: Arc<Engine>,
        dir: &Path,
        built_in: Vec<String>,
        state: StateDir,
        wake: Arc<Wake>,
        health: Arc<Health>,
    ) -> Self {
        let set = PluginSet::of([]).with_built_in(&built_in);
        serve(set.kinds());
        Self {
            engine,
            dir: dir.to_owned(),
            versions: VersionStore::for_plugin_dir(state, dir),
            kinds: watch::Sender::new(set.kinds().to_vec()),
            set: ArcSwap::from_pointee(set),
            built_in,
            complete: watch::Sender::new(false),
            wake,
            feedback_wake: Arc::default(),
            health,
            slots: Mutex::default(),
        }
    }

    /// The plugins that serve now.
    #[must_use]
    pub fn current(&self) -> Arc<PluginSet> {
        self.set.load_full()
    }

    /// The kinds that are served, and each change of them.
    #[must_use]
    pub fn kinds(&self) -> watch::Receiver<Vec<String>> {
        self.kinds.subscribe()
    }

    /// The plugin directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the watcher look at the directory now.
    pub fn look_again(&self) {
        self.feedback_wake.wake(Reason::Plugins);
    }

    /// Waits until each file that was in the directory when the daemon started serves or was refused. Cancel-safe.
    pub async fn completed(&self) {
        self.complete.subscribe().wait_for(|complete| *complete).await.expect("the registry holds the sender");
    }

    /// Whether each file that was in the directory when the daemon started serves or was refused. Before that, the
    /// plugin of a kind that is not served may still be loading.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Loads the files that are in the directory when the daemon starts. Each serves as soon as it is ready, and the
    /// files before it by name have been admitted or refused.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub async fn load_all(&self) -> std::io::Result<()> {
        let stats = look(&self.dir)?;
        self.slots().settle_tracker.record_look(&stats);
        self.reconcile(stats).await;
        self.health.note("state", self.versions.write_failure());
        self.complete.send_replace(true);
        self.wake.wake(Reason::Plugins);
        Ok(())
    }

    /// Handles the feedback of the plugins that serve, looks at the directory, and loads the files that have changed
    /// and settled. Returns whether a file is still changing, so that another look should follow in a moment.
    pub(super) async fn refresh(&self) -> bool {
        self.versions.retry_writes();
        self.apply_feedback().await;
        let is_changing = self.look_at_files().await;
        self.health.note("state", self.versions.write_failure());
        is_changing
    }

    async fn look_at_files(&self) -> bool {
        let stats = match look(&self.dir) {
            Ok(stats) => {
                self.slots().dir_problem = None;
                stats
            }
            Err(error) => {
                // The directory may be on a mount that comes back, so the plugins that serve go on.
                let problem = error.to_string();
                if self.slots().dir_problem.replace(problem.clone()) != Some(problem) {
                    warn!(%error, "the plugin directory {} cannot be read, what serves goes on", self.dir.display());
                }
                return false;
            }
        };
        let (settled, is_changing) = self.slots().settle_tracker.record_look(&stats);
        self.reconcile(settled).await;
        is_changing
    }

    /// Loads, refuses or removes the files of a look that differ from what their slots have seen.
    async fn reconcile(&self, settled: BTreeMap<String, FileStats>) {
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        {
            let slots = self.slots();
            for (file, stats) in settled {
                match slots.by_file.get(&file) {
                    Some(slot) if slot.stats == Some(stats) => {}
                    Some(_) if !stats.is_listed => gone.push(file),
                    None if !stats.is_listed => {}
                    _ => changed.push((file, stats)),
                }
            }
        }
        // A file that is gone and a file that is new may be one file that was renamed. So the new files are admitted
        // before those that are gone are removed, and the kinds are served without a gap.
        let has_changes = !changed.is_empty() || !gone.is_empty();
        let prepared = futures_util::stream::iter(changed).map(|(file, stats)| async move {
            let prepared = self.prepare(&file, Some(stats)).await;
            (file, stats, prepared)
        });
        // `buffered` keeps the order of the names, however long each file takes.
        let mut prepared = std::pin::pin!(prepared.buffered(MAX_PREPARING));
        while let Some((file, stats, prepared)) = prepared.next().await {
            self.apply_prepared(&file, Some(stats), prepared, &gone).await;
        }
        for file in gone {
            self.remove(&file);
        }
        if !has_changes {
            return;
        }
        // A kind may have become free for a file that waits for it.
        loop {
            let waiting: Vec<String> = {
                let slots = self.slots();
                slots.by_file.iter().filter(|(_, slot)| slot.waits_for_kind).map(|(file, _)| file.clone()).collect()
            };
            let mut has_progress = false;
            for file in waiting {
                let prepared = self.prepare(&file, None).await;
                self.apply_prepared(&file, None, prepared, &[]).await;
                has_progress |= self.slots().by_file.get(&file).is_some_and(|slot| !slot.waits_for_kind);
            }
            if !has_progress {
                return;
            }
        }
    }

    /// Admits a file that was prepared, or records why it does not serve. The kinds of files in `gone` count as free.
    async fn apply_prepared(&self, file: &str, stats: Option<FileStats>, prepared: Prepared, gone: &[String]) {
        let (error, identity) = match prepared {
            Prepared::Unchanged => return,
            Prepared::Refused(error, identity) => (error, identity),
            Prepared::Ready(plugin, identity) => match self.admit(file, *plugin, gone) {
                Ok(previous) => {
                    // A version whose breaker is not closed when it is replaced is not kept as one to roll back to.
                    let kinds = previous.iter().flat_map(|previous| previous.kinds());
                    for (kind, _) in kinds.filter(|(_, kind)| kind.breaker().0 != BreakerState::Closed) {
                        self.versions.forget_kind(kind);
                    }
                    return;
                }
                Err(error) => (error, Some(identity)),
            },
        };
        self.refuse(file, stats, &error, identity, gone).await;
    }

    /// Lets `plugin` serve, and returns the generation that it replaces. The kinds of files in `gone` count as free.
    ///
    /// # Errors
    ///
    /// [`LoadError::KindTaken`] when another file serves one of its kinds.
    fn admit(&self, file: &str, mut plugin: Plugin, gone: &[String]) -> Result<Option<Arc<Plugin>>, LoadError> {
        let mut slots = self.slots();
        for (other, slot) in &slots.by_file {
            let Some(active) = &slot.active else { continue };
            if other == file || gone.contains(other) {
                continue;
            }
            if let Some(kind) = plugin.kinds().keys().find(|kind| active.kinds().contains_key(*kind)) {
                return Err(LoadError::KindTaken { kind: kind.clone(), by: active.file().to_owned() });
            }
        }
        slots.last_generation += 1;
        plugin.set_generation(slots.last_generation);
        plugin.register_call_metrics();
        let plugin = Arc::new(plugin);
        let slot = slots.by_file.entry(file.to_owned()).or_default();
        slot.problem = None;
        slot.waits_for_kind = false;
        let previous = slot.active.replace(Arc::clone(&plugin));
        // If the file was renamed, the generation that served under the old name leaves in the same swap.
        let same_kind = |slot: &Slot| {
            slot.active.as_ref().is_some_and(|other| other.kinds().keys().any(|kind| plugin.kinds().contains_key(kind)))
        };
        let renamed: Vec<&String> =
            gone.iter().filter(|other| slots.by_file.get(*other).is_some_and(same_kind)).collect();
        for other in &renamed {
            slots.by_file.remove(*other);
        }
        self.swap_set(&slots);
        drop(slots);
        count_reload(Reload::Loaded);
        let kinds: Vec<&str> = plugin.kinds().keys().map(String::as_str).collect();
        info!(
            plugin = plugin.label(),
            generation = plugin.generation(),
            kinds = kinds.join(" "),
            replaces = previous.as_deref().map(Plugin::label),
            "loaded {}",
            plugin.file().display()
        );
        for other in renamed {
            self.versions.forget_file(other);
        }
        Ok(previous)
    }

    /// Records why a file does not serve. The generation that served from it goes on. If none did, the version from
    /// this file that built rows last is loaded, if it was kept.
    async fn refuse(
        &self,
        file: &str,
        stats: Option<FileStats>,
        error: &LoadError,
        identity: Option<Identity>,
        gone: &[String],
    ) {
        let waits_for_kind = matches!(error, LoadError::KindTaken { .. });
        let active = {
            let mut slots = self.slots();
            let slot = slots.by_file.entry(file.to_owned()).or_default();
            slot.stats = stats.or(slot.stats);
            slot.waits_for_kind = waits_for_kind;
            let problem = (error.to_string(), identity);
            if slot.problem.replace(problem.clone()) == Some(problem) {
                return;
            }
            slot.active.clone()
        };
        count_reload(Reload::Refused);
        let path = self.dir.join(file);
        if let Some(active) = active {
            warn!(reason = %error, "refused the plugin {}: {} still serves", path.display(), active.label());
            return;
        }
        warn!(reason = %error, "refused the plugin {}: the others serve", path.display());
        if waits_for_kind {
            return;
        }
        self.serve_last_good_version(file, gone).await;
    }

    fn remove(&self, file: &str) {
        let mut slots = self.slots();
        let Some(slot) = slots.by_file.remove(file) else { return };
        self.swap_set(&slots);
        drop(slots);
        if let Some(plugin) = slot.active {
            count_reload(Reload::Removed);
            info!(plugin = plugin.label(), "removed {}: rows of its kinds are held", plugin.file().display());
        }
        self.versions.forget_file(file);
    }

    /// Replaces the set with the active generations of `slots`, and wakes the scheduler.
    fn swap_set(&self, slots: &Slots) {
        let plugins = slots.by_file.values().filter_map(|slot| slot.active.clone());
        let set = PluginSet::of(plugins).with_built_in(&self.built_in);
        let kinds = set.kinds().to_vec();
        // The metrics learn the kinds before the kinds are served, so that no row of theirs is counted as `(unserved)`.
        serve(&kinds);
        self.set.store(Arc::new(set));
        self.kinds.send_if_modified(|previous| {
            let modified = *previous != kinds;
            *previous = kinds;
            modified
        });
        self.wake.wake(Reason::Plugins);
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().expect("no thread panics with this lock")
    }
}
