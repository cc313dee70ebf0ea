//! Prepares one file: reads it and loads it into a generation that the registry can admit.
//!
//! Must never let a generation serve. It stops one in a single case: the allowlist does not contain its digest any
//! more.

use std::sync::Arc;

use tracing::warn;

use crate::plugins::generation::Plugin;
use crate::plugins::loading::allowlist::Allowlist;
use crate::plugins::loading::directory::FileStats;
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::{Identity, Source};
use crate::plugins::registry::Registry;

/// The result of preparing a file that has changed.
pub(super) enum Prepared {
    /// There is nothing to do: the version serves already, was refused before, or is still being written.
    Unchanged,
    /// The file's generation can serve, unless another file serves one of its kinds.
    Ready(Box<Plugin>, Identity),
    /// The file cannot serve. The identity is that of the refused version; `None` if another attempt with the same
    /// bytes may end differently.
    Refused(LoadError, Option<Identity>),
}

impl Registry {
    /// Reads `file` and loads it. Nothing that serves is changed, except that a generation whose digest is not allowed
    /// any more is stopped.
    pub(super) async fn prepare(&self, file: &str, stats: Option<FileStats>) -> Prepared {
        let refused = |error| Prepared::Refused(error, None);
        if let Err(error) = self.stop_if_not_allowed(file) {
            return refused(error);
        }
        let path = self.dir.join(file);
        let source = match tokio::task::spawn_blocking(move || Source::read(&path, None)).await {
            Ok(Ok(source)) => source,
            // The next look sees the file as changed, and prepares it again.
            Ok(Err(LoadError::Changing)) => return Prepared::Unchanged,
            Ok(Err(error)) => return refused(error),
            Err(panic) => return refused(LoadError::Damaged(panic.to_string())),
        };
        let identity = source.identity();
        {
            let mut slots = self.slots();
            let slot = slots.by_file.entry(file.to_owned()).or_default();
            slot.stats = stats.or(slot.stats);
            if slot.active.as_ref().is_some_and(|active| *active.identity() == identity) {
                // The file was touched, moved, or changed back to the version that serves.
                slot.problem = None;
                slot.waits_for_kind = false;
                return Prepared::Unchanged;
            }
            let is_refused_already =
                slot.problem.as_ref().is_some_and(|(_, refused)| refused.as_ref() == Some(&identity));
            if is_refused_already && !slot.waits_for_kind {
                return Prepared::Unchanged;
            }
        }
        if let Some(reason) = self.versions.quarantine_reason(&identity) {
            return Prepared::Refused(LoadError::Quarantined(reason), Some(identity));
        }
        match self.load(file, source).await {
            Ok(plugin) => Prepared::Ready(Box::new(plugin), identity),
            Err(error) => {
                let identity = (!error.is_from_allowlist()).then_some(identity);
                Prepared::Refused(error, identity)
            }
        }
    }

    /// Stops the generation that serves from `file` if the allowlist does not contain its digest any more, whatever the
    /// file contains now. If the list cannot be read, nothing is stopped.
    fn stop_if_not_allowed(&self, file: &str) -> Result<(), LoadError> {
        let allowed = Allowlist::read(&self.dir)?;
        let mut slots = self.slots();
        let Some(slot) = slots.by_file.get_mut(file) else { return Ok(()) };
        if let Some(plugin) = slot.active.take_if(|active| allowed.check(active.digest(), file).is_err()) {
            self.swap_set(&slots);
            warn!(
                plugin = plugin.label(),
                "{} is not allowed any more: rows of its kinds are held",
                plugin.file().display()
            );
        }
        Ok(())
    }

    /// Loads `source`, which is from `file` or was kept of it, into a generation that does not serve yet.
    pub(super) async fn load(&self, file: &str, source: Source) -> Result<Plugin, LoadError> {
        Allowlist::read(&self.dir)?.check(source.digest(), file)?;
        Plugin::load(&self.engine, &self.dir.join(file), source, Arc::clone(&self.feedback_wake)).await
    }
}
