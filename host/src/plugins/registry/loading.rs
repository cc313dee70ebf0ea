//! From a file to what could serve. Nothing here lets anything serve.

use std::sync::Arc;

use tracing::warn;

use crate::plugins::generation::Plugin;
use crate::plugins::loading::allowlist::Allowlist;
use crate::plugins::loading::directory::Seen;
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::{Identity, Source};
use crate::plugins::registry::Registry;

/// What was made of a file that has changed.
pub(super) enum Prepared {
    /// There is nothing to do.
    Nothing,
    /// It serves, unless another file has its kinds.
    Plugin(Box<Plugin>, Identity),
    /// It cannot serve; which version that is, if another look at the same would say the same.
    Refused(LoadError, Option<Identity>),
}

impl Registry {
    /// Reads a file, and makes of it what could serve. Changes nothing that serves, but for what is not allowed any more.
    pub(super) async fn prepare(&self, file: &str, seen: Option<Seen>) -> Prepared {
        let refused = |error| Prepared::Refused(error, None);
        if let Err(error) = self.end_what_is_not_allowed(file) {
            return refused(error);
        }
        let path = self.dir.join(file);
        let source = match tokio::task::spawn_blocking(move || Source::read(&path, None)).await {
            Ok(Ok(source)) => source,
            // The next look will see it otherwise.
            Ok(Err(LoadError::Changing)) => return Prepared::Nothing,
            Ok(Err(error)) => return refused(error),
            Err(panic) => return refused(LoadError::Damaged(panic.to_string())),
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
                return Prepared::Nothing;
            }
            let known = slot.problem.as_ref().is_some_and(|(_, refused)| refused.as_ref() == Some(&identity));
            if known && !slot.waits_for_kind {
                return Prepared::Nothing;
            }
        }
        if let Some(why) = self.memory.quarantined(&identity) {
            return Prepared::Refused(LoadError::Quarantined(why), Some(identity));
        }
        match self.load(file, source).await {
            Ok(plugin) => Prepared::Plugin(Box::new(plugin), identity),
            Err(error) => {
                let identity = (!error.is_by_the_list()).then_some(identity);
                Prepared::Refused(error, identity)
            }
        }
    }

    /// Whatever lies in `file` now: what serves from it ends if the list does not allow it any more. A list that cannot be
    /// read ends nothing.
    fn end_what_is_not_allowed(&self, file: &str) -> Result<(), LoadError> {
        let allowed = Allowlist::read(&self.dir)?;
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

    pub(super) async fn load(&self, file: &str, source: Source) -> Result<Plugin, LoadError> {
        Allowlist::read(&self.dir)?.check(source.digest(), file)?;
        Plugin::load(&self.engine, &self.dir.join(file), source, Arc::clone(&self.feedback_wake)).await
    }
}
