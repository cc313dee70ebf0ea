//! RowRef plugins serve. The directory says what should; this says what does: a file that cannot serve changes nothing,
//! the last good generation goes on. Every change is one swap of the whole set, so that a batch sees one set from
//! beginning to end, and the generation it uses lives until the batch ends.
//!
//! Only the watcher changes anything here. Files are read and compiled side by side, and serve one after the other in the
//! order of their names, so that of two with the same kind it is always the same that does. Everybody else reads.

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
use crate::plugins::loading::directory::{Seen, Settling, look};
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::Identity;
use crate::plugins::runtime::engine::Engine;
use crate::plugins::state::{Memory, StateDir};
use crate::telemetry::{Reload, count_reload, serve};

use loading::Prepared;

pub use status::{GenerationStatus, KindStatus, PluginStatus};

/// Files that are being made ready at once: as many as wait for each other's reading, as few as fit into memory. How many of
/// them are compiled at once the engine decides.
const AHEAD: usize = 16;

/// The plugins of one directory.
#[expect(missing_debug_implementations, reason = "the engine has none")]
pub struct Registry {
    engine: Arc<Engine>,
    dir: PathBuf,
    memory: Memory,
    set: ArcSwap<PluginSet>,
    kinds: watch::Sender<Vec<String>>,
    /// Whether everything that lay in the directory when the daemon started was dealt with.
    complete: watch::Sender<bool>,
    /// Rung when another set serves.
    wake: Arc<Wake>,
    /// Rung when a plugin has feedback, or the directory.
    pub(super) feedback_wake: Arc<Wake>,
    health: Arc<Health>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    settling: Settling,
    by_file: BTreeMap<String, Slot>,
    generations: u64,
    dir_problem: Option<String>,
}

/// One file of the directory.
#[derive(Debug, Default)]
struct Slot {
    /// What it looked like when it was dealt with.
    seen: Option<Seen>,
    /// What serves.
    active: Option<Arc<Plugin>>,
    /// Why the file that lies there does not serve, and which version that is.
    problem: Option<(String, Option<Identity>)>,
    /// It would serve, were it not for another file with the same kind.
    waits_for_kind: bool,
}

impl Registry {
    /// The plugins in `dir`; none is loaded yet. `wake` is rung whenever others serve; `health` is told if `state` cannot be
    /// written.
    #[must_use]
    pub fn new(engine: Arc<Engine>, dir: &Path, state: StateDir, wake: Arc<Wake>, health: Arc<Health>) -> Self {
        Self {
            engine,
            dir: dir.to_owned(),
            memory: Memory::of(state, dir),
            set: ArcSwap::default(),
            kinds: watch::Sender::new(Vec::new()),
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

    /// The kinds that are served, whenever they change.
    #[must_use]
    pub fn kinds(&self) -> watch::Receiver<Vec<String>> {
        self.kinds.subscribe()
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Has the watcher look at the directory now.
    pub fn look_again(&self) {
        self.feedback_wake.wake(Reason::Plugins);
    }

    /// Waits until everything that lay in the directory when the daemon started serves or was refused. Cancel-safe.
    pub async fn completed(&self) {
        self.complete.subscribe().wait_for(|complete| *complete).await.expect("we have the sender");
    }

    /// Whether that is so: a kind that nobody serves may be one whose plugin comes in a moment before.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Loads what lies in the directory when the daemon starts; each serves as soon as it is ready, and those before it.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub async fn load_all(&self) -> std::io::Result<()> {
        let seen = look(&self.dir)?;
        self.slots().settling.settled(&seen);
        self.reconcile(seen).await;
        self.health.note("state", self.memory.in_trouble());
        self.complete.send_replace(true);
        self.wake.wake(Reason::Plugins);
        Ok(())
    }

    /// Looks at the directory, loads what has changed and settled, and hears the feedback of what serves. Returns whether
    /// something is still changing, so that another look should follow in a moment.
    pub(super) async fn refresh(&self) -> bool {
        self.memory.try_again();
        self.apply_feedback().await;
        let changing = self.look_at_files().await;
        self.health.note("state", self.memory.in_trouble());
        changing
    }

    async fn look_at_files(&self) -> bool {
        let seen = match look(&self.dir) {
            Ok(seen) => {
                self.slots().dir_problem = None;
                seen
            }
            Err(error) => {
                // It may be a mount that comes back. What serves goes on.
                let problem = error.to_string();
                if self.slots().dir_problem.replace(problem.clone()) != Some(problem) {
                    warn!(%error, "the plugin directory {} cannot be read, what serves goes on", self.dir.display());
                }
                return false;
            }
        };
        let (settled, changing) = self.slots().settling.settled(&seen);
        self.reconcile(settled).await;
        changing
    }

    /// Deals with files that do not look as they did when they were dealt with.
    async fn reconcile(&self, settled: BTreeMap<String, Seen>) {
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        {
            let slots = self.slots();
            for (file, seen) in settled {
                match slots.by_file.get(&file) {
                    Some(slot) if slot.seen == Some(seen) => {}
                    Some(_) if !seen.listed => gone.push(file),
                    None if !seen.listed => {}
                    _ => changed.push((file, seen)),
                }
            }
        }
        // What is gone and what comes may be one file with a new name: then the kinds change hands without a gap.
        let dealt_with = !changed.is_empty() || !gone.is_empty();
        let prepared = futures_util::stream::iter(changed).map(|(file, seen)| async move {
            let prepared = self.prepare(&file, Some(seen)).await;
            (file, seen, prepared)
        });
        // In their order, however long each takes.
        let mut prepared = std::pin::pin!(prepared.buffered(AHEAD));
        while let Some((file, seen, prepared)) = prepared.next().await {
            self.deal_with(&file, Some(seen), prepared, &gone).await;
        }
        for file in gone {
            self.remove(&file);
        }
        if !dealt_with {
            return;
        }
        // A kind may have become free.
        loop {
            let waiting: Vec<String> = {
                let slots = self.slots();
                slots.by_file.iter().filter(|(_, slot)| slot.waits_for_kind).map(|(file, _)| file.clone()).collect()
            };
            let mut progress = false;
            for file in waiting {
                let prepared = self.prepare(&file, None).await;
                self.deal_with(&file, None, prepared, &[]).await;
                progress |= self.slots().by_file.get(&file).is_some_and(|slot| !slot.waits_for_kind);
            }
            if !progress {
                return;
            }
        }
    }

    /// Lets what was made of a file serve, or notes why it does not. Files in `gone` do not stand in its way.
    async fn deal_with(&self, file: &str, seen: Option<Seen>, prepared: Prepared, gone: &[String]) {
        let (error, identity) = match prepared {
            Prepared::Nothing => return,
            Prepared::Refused(error, identity) => (error, identity),
            Prepared::Plugin(plugin, identity) => match self.admit(file, *plugin, gone) {
                Ok(before) => {
                    // A version that fails when it is replaced is nothing to go back to.
                    let kinds = before.iter().flat_map(|before| before.kinds());
                    for (kind, _) in kinds.filter(|(_, kind)| kind.breaker().0 != BreakerState::Closed) {
                        self.memory.forget_kind(kind);
                    }
                    return;
                }
                Err(error) => (error, Some(identity)),
            },
        };
        self.refuse(file, seen, &error, identity, gone).await;
    }

    /// Lets `plugin` serve in place of what served from this file, which is returned.
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
        slots.generations += 1;
        plugin.set_generation(slots.generations);
        plugin.show_calls();
        let plugin = Arc::new(plugin);
        let slot = slots.by_file.entry(file.to_owned()).or_default();
        slot.problem = None;
        slot.waits_for_kind = false;
        let before = slot.active.replace(Arc::clone(&plugin));
        // What comes from a file with another name takes over from it at once.
        let same_kind = |slot: &Slot| {
            slot.active.as_ref().is_some_and(|other| other.kinds().keys().any(|kind| plugin.kinds().contains_key(kind)))
        };
        let renamed: Vec<&String> =
            gone.iter().filter(|other| slots.by_file.get(*other).is_some_and(same_kind)).collect();
        for other in &renamed {
            slots.by_file.remove(*other);
        }
        self.publish(&slots);
        drop(slots);
        count_reload(Reload::Loaded);
        let kinds: Vec<&str> = plugin.kinds().keys().map(String::as_str).collect();
        info!(
            plugin = plugin.label(),
            generation = plugin.generation(),
            kinds = kinds.join(" "),
            replaces = before.as_deref().map(Plugin::label),
            "loaded {}",
            plugin.file().display()
        );
        for other in renamed {
            self.memory.forget(other);
        }
        Ok(before)
    }

    /// Notes why a file does not serve. What served from it goes on; if nothing did, the version that built rows last.
    async fn refuse(
        &self,
        file: &str,
        seen: Option<Seen>,
        error: &LoadError,
        identity: Option<Identity>,
        gone: &[String],
    ) {
        let waits_for_kind = matches!(error, LoadError::KindTaken { .. });
        let active = {
            let mut slots = self.slots();
            let slot = slots.by_file.entry(file.to_owned()).or_default();
            slot.seen = seen.or(slot.seen);
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
        if let Some(source) = self.memory.good_of_file(file)
            && self.memory.quarantined(&source.identity()).is_none()
        {
            let kept = (self.slots().by_file.get_mut(file)).and_then(|slot| slot.problem.take());
            match self.load(file, source).await.and_then(|plugin| self.admit(file, plugin, gone)) {
                Ok(_) => warn!("in place of {}, the version that built rows last serves", path.display()),
                Err(error) => warn!(reason = %error, "nor does the version that built rows last serve"),
            }
            if let Some(slot) = self.slots().by_file.get_mut(file) {
                slot.problem = kept;
            }
        }
    }

    fn remove(&self, file: &str) {
        let mut slots = self.slots();
        let Some(slot) = slots.by_file.remove(file) else { return };
        self.publish(&slots);
        drop(slots);
        if let Some(plugin) = slot.active {
            count_reload(Reload::Removed);
            info!(plugin = plugin.label(), "removed {}: rows of its kinds are held", plugin.file().display());
        }
        self.memory.forget(file);
    }

    /// Lets what the slots say serve.
    fn publish(&self, slots: &Slots) {
        let set = PluginSet::of(slots.by_file.values().filter_map(|slot| slot.active.clone()));
        let kinds = set.kinds().to_vec();
        // Before they serve, so that none of their rows is counted as another's.
        serve(&kinds);
        self.set.store(Arc::new(set));
        self.kinds.send_if_modified(|before| {
            let modified = *before != kinds;
            *before = kinds;
            modified
        });
        self.wake.wake(Reason::Plugins);
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().expect("nobody panics with it")
    }
}
