//! Handles the feedback of the generations that serve. A version that has answered for a row of a kind is kept as the
//! version to roll back to. A version that fails for every row of a kind from its start is quarantined, and the version
//! that was kept before serves again. It also serves in place of a file that was refused.

use std::sync::Arc;

use tracing::{error, warn};

use crate::plugins::generation::{Feedback, Plugin};
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::Source;
use crate::plugins::registry::Registry;
use crate::telemetry::{Reload, count_reload};

impl Registry {
    /// Handles what the generations that serve have reported since the last call.
    pub(super) async fn apply_feedback(&self) {
        let plugins: Vec<(String, Arc<Plugin>)> = {
            let slots = self.slots();
            slots.by_file.iter().filter_map(|(file, slot)| Some((file.clone(), slot.active.clone()?))).collect()
        };
        for (file, plugin) in plugins {
            for feedback in plugin.take_feedback() {
                match feedback {
                    // The version could not be kept: the feedback goes back, so that the next call tries again.
                    Feedback::FirstAnswer(kind) if !self.keep_good_version(&kind, &file, &plugin).await => {
                        plugin.push_feedback(Feedback::FirstAnswer(kind));
                    }
                    Feedback::FirstAnswer(_) => {}
                    Feedback::FailedFromTheStart(kind, reason) => self.roll_back(&kind, &file, &plugin, &reason).await,
                }
            }
        }
    }

    /// In place of a file that was refused, loads the version from it that built rows last, if it was kept. The reason of the refusal
    /// stays.
    pub(super) async fn serve_last_good_version(&self, file: &str, gone: &[String]) {
        let Some(source) = self.versions.last_good_version(file) else { return };
        if self.versions.quarantine_reason(&source.identity()).is_some() {
            return;
        }
        let place = self.dir.join(file);
        let problem = (self.slots().by_file.get_mut(file)).and_then(|slot| slot.problem.take());
        match self.load(file, source).await.and_then(|plugin| self.admit(file, plugin, gone)) {
            Ok(_) => warn!("in place of {}, the version that built rows last serves", place.display()),
            Err(error) => {
                warn!(reason = %error, "in place of {}, the version that built rows last cannot serve either", place.display());
            }
        }
        if let Some(slot) = self.slots().by_file.get_mut(file) {
            slot.problem = problem;
        }
    }

    /// Keeps the bytes of a generation that has answered for a row of `kind`, unless the file has changed since it was
    /// loaded. Returns `false` if the bytes could not be written and the caller must try again.
    async fn keep_good_version(&self, kind: &str, file: &str, plugin: &Plugin) -> bool {
        if self.versions.write_failure().is_some() {
            return false;
        }
        let path = self.dir.join(file);
        let read = tokio::task::spawn_blocking(move || Source::read(&path, None)).await;
        if let Ok(Ok(source)) = read
            && source.identity() == *plugin.identity()
        {
            return self.versions.keep_good_version(kind, file, &source);
        }
        true
    }

    /// Replaces `plugin`, which never answered for a row of `kind`, with the version that was kept for the kind, and
    /// quarantines it. If no other version was kept, `plugin` goes on and its breaker stays open.
    async fn roll_back(&self, kind: &str, file: &str, plugin: &Plugin, reason: &str) {
        let label = plugin.label();
        let Some(source) =
            self.versions.good_version(kind, file).filter(|source| source.identity() != *plugin.identity())
        else {
            warn!(
                plugin = label,
                generation = plugin.generation(),
                schedule.kind = kind,
                error = reason,
                "the breaker is open from the start: rows of the kind wait until one succeeds"
            );
            return;
        };
        let reason = format!("{label} failed at every row of the kind {kind:?} from the start, at last: {reason}");
        self.versions.quarantine(plugin.identity(), &reason);
        match self.load(file, source).await.and_then(|plugin| self.admit(file, plugin, &[])) {
            Ok(_) => {
                let mut slots = self.slots();
                let slot = slots.by_file.entry(file.to_owned()).or_default();
                slot.problem =
                    Some((LoadError::Quarantined(reason.clone()).to_string(), Some(plugin.identity().clone())));
                let serves = slot.active.as_deref().map_or("nothing", Plugin::label);
                count_reload(Reload::RolledBack);
                error!(reason, "rolled back {}: {serves} serves again", self.dir.join(file).display());
            }
            Err(error) => error!(reason = %error, "could not roll back {}", self.dir.join(file).display()),
        }
    }
}
