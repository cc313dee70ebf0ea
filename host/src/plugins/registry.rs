//! Which plugins serve. The directory says what should; this says what does: a file that cannot serve changes nothing,
//! the last good generation goes on. Every change is one swap of the whole set, so that a batch sees one set from
//! beginning to end, and the generation it uses lives until the batch ends.
//!
//! Only the watcher changes anything here, one file after the other. Everybody else reads.

mod rollback;
mod status;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tracing::{info, warn};

use super::PluginSet;
use super::allowed::Allowed;
use super::breaker::BreakerState;
use super::check::LoadError;
use super::directory::{Seen, Settling, look};
use super::engine::Engine;
use super::plugin::Plugin;
use super::source::{Identity, Source};
use super::state::{Memory, StateDir};
use crate::telemetry::{Reload, count_reload, serve};
use crate::wake::{Reason, Wake};

pub use status::{GenerationStatus, KindStatus, PluginStatus};

/// The plugins of one directory.
#[expect(missing_debug_implementations, reason = "the engine has none")]
pub struct Registry {
    engine: Arc<Engine>,
    dir: PathBuf,
    memory: Memory,
    set: ArcSwap<PluginSet>,
    kinds: watch::Sender<Vec<String>>,
    /// Rung when another set serves.
    wake: Arc<Wake>,
    /// Rung when a plugin has news, or the directory.
    pub(super) bell: Arc<Wake>,
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
    /// The plugins in `dir`; none is loaded yet. `wake` is rung whenever others serve.
    #[must_use]
    pub fn new(engine: Arc<Engine>, dir: &Path, state: StateDir, wake: Arc<Wake>) -> Self {
        Self {
            engine,
            dir: dir.to_owned(),
            memory: Memory::of(state, dir),
            set: ArcSwap::default(),
            kinds: watch::Sender::new(Vec::new()),
            wake,
            bell: Arc::default(),
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

    /// Loads what lies in the directory when the daemon starts.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub async fn load_all(&self) -> std::io::Result<()> {
        let seen = look(&self.dir)?;
        self.slots().settling.settled(&seen);
        self.reconcile(seen).await;
        Ok(())
    }

    /// Looks at the directory, loads what has changed and settled, and hears the news of what serves. Returns whether
    /// something is still changing, so that another look should follow in a moment.
    pub(super) async fn refresh(&self) -> bool {
        self.hear_news().await;
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
        for (file, seen) in changed {
            self.load_file(&file, Some(seen), &gone).await;
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
                self.load_file(&file, None, &[]).await;
                progress |= self.slots().by_file.get(&file).is_some_and(|slot| !slot.waits_for_kind);
            }
            if !progress {
                return;
            }
        }
    }

    /// Reads a file, and lets it serve if it can. Files in `gone` do not stand in its way.
    async fn load_file(&self, file: &str, seen: Option<Seen>, gone: &[String]) {
        if let Err(error) = self.end_what_is_not_allowed(file) {
            return self.refuse(file, seen, &error, None, gone).await;
        }
        let path = self.dir.join(file);
        let read = tokio::task::spawn_blocking(move || Source::read(&path, None)).await;
        let source = match read {
            Ok(Ok(source)) => source,
            // The next look will see it otherwise.
            Ok(Err(LoadError::Changing)) => return,
            Ok(Err(error)) => return self.refuse(file, seen, &error, None, gone).await,
            Err(panic) => return self.refuse(file, seen, &LoadError::Damaged(panic.to_string()), None, gone).await,
        };
        let identity = source.identity();
        {
            let mut slots = self.slots();
            let slot = slots.by_file.entry(file.to_owned()).or_default();
            slot.seen = seen.or(slot.seen);
            if slot.active.as_ref().is_some_and(|active| *active.identity() == identity) {
                // Touched, moved, or back to what serves.
                slot.problem = None;
                slot.waits_for_kind = false;
                return;
            }
            let known = slot.problem.as_ref().is_some_and(|(_, refused)| refused.as_ref() == Some(&identity));
            if known && !slot.waits_for_kind {
                return;
            }
        }
        if let Some(why) = self.memory.quarantined(&identity) {
            return self.refuse(file, seen, &LoadError::Quarantined(why), Some(identity), gone).await;
        }
        match self.load(file, source).await.and_then(|plugin| self.admit(file, plugin, gone)) {
            Ok(before) => {
                // A version that fails when it is replaced is nothing to go back to.
                let kinds = before.iter().flat_map(|before| before.kinds());
                for (kind, _) in kinds.filter(|(_, kind)| kind.breaker().0 != BreakerState::Closed) {
                    warn_of_memory(self.memory.forget_kind(kind));
                }
            }
            Err(error) => {
                let identity = (!error.is_by_the_list()).then_some(identity);
                self.refuse(file, seen, &error, identity, gone).await;
            }
        }
    }

    /// Whatever lies in `file` now: what serves from it ends if the list does not allow it any more. A list that cannot be
    /// read ends nothing.
    fn end_what_is_not_allowed(&self, file: &str) -> Result<(), LoadError> {
        let allowed = Allowed::read(&self.dir)?;
        let mut slots = self.slots();
        let Some(slot) = slots.by_file.get_mut(file) else { return Ok(()) };
        if let Some(plugin) = slot.active.take_if(|active| allowed.check(active.digest(), file).is_err()) {
            self.publish(&slots);
            warn!(
                plugin = plugin.label(),
                "{} is not allowed any more: rows of its kinds are held",
                plugin.file().display()
            );
        }
        Ok(())
    }

    async fn load(&self, file: &str, source: Source) -> Result<Plugin, LoadError> {
        Allowed::read(&self.dir)?.check(source.digest(), file)?;
        let generation = {
            let mut slots = self.slots();
            slots.generations += 1;
            slots.generations
        };
        Plugin::load(&self.engine, &self.dir.join(file), source, generation, Arc::clone(&self.bell)).await
    }

    /// Lets `plugin` serve in place of what served from this file, which is returned.
    fn admit(&self, file: &str, plugin: Plugin, gone: &[String]) -> Result<Option<Arc<Plugin>>, LoadError> {
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
            self.forget(other);
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
        self.forget(file);
    }

    fn forget(&self, file: &str) {
        warn_of_memory(self.memory.forget(file));
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

/// The state directory is full or read-only, perhaps. Nothing depends on it now; a rollback or a restart might.
fn warn_of_memory(outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        warn!(%error, "could not write to the state directory: a rollback after a restart may not be possible");
    }
}
