//! What a generation has to tell of itself, and what follows: a version that has built a row is what can be gone back to;
//! one that fails at everything from the start is put aside, and the version before it serves again.

use std::sync::Arc;

use tracing::{error, warn};

use crate::plugins::generation::{Feedback, Plugin};
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::Source;
use crate::plugins::registry::Registry;
use crate::telemetry::{Reload, count_reload};

impl Registry {
    /// What serving plugins have to tell: the first row built of a kind, or that nothing works.
    pub(super) async fn apply_feedback(&self) {
        let plugins: Vec<(String, Arc<Plugin>)> = {
            let slots = self.slots();
            slots.by_file.iter().filter_map(|(file, slot)| Some((file.clone(), slot.active.clone()?))).collect()
        };
        for (file, plugin) in plugins {
            for feedback in plugin.take_feedback() {
                match feedback {
                    // What cannot be kept now is when it can.
                    Feedback::Answered(kind) if !self.remember(&kind, &file, &plugin).await => {
                        plugin.tell(Feedback::Answered(kind));
                    }
                    Feedback::Answered(_) => {}
                    Feedback::FailedFromTheStart(kind, why) => self.roll_back(&kind, &file, &plugin, &why).await,
                }
            }
        }
    }

    /// Keeps the bytes of a generation that has built a row, unless the file is another one already. Returns `false` if it
    /// must be tried again.
    async fn remember(&self, kind: &str, file: &str, plugin: &Plugin) -> bool {
        if self.memory.in_trouble().is_some() {
            return false;
        }
        let path = self.dir.join(file);
        let read = tokio::task::spawn_blocking(move || Source::read(&path, None)).await;
        if let Ok(Ok(source)) = read
            && source.identity() == *plugin.identity()
        {
            return self.memory.remember(kind, file, &source);
        }
        true
    }

    /// Puts the version that built rows of `kind` before in the place of one that never could.
    async fn roll_back(&self, kind: &str, file: &str, plugin: &Plugin, why: &str) {
        let label = plugin.label();
        let Some(source) = self.memory.good(kind, file).filter(|source| source.identity() != *plugin.identity()) else {
            warn!(
                plugin = label,
                generation = plugin.generation(),
                schedule.kind = kind,
                error = why,
                "the breaker is open from the start: rows of the kind wait until one succeeds"
            );
            return;
        };
        let why = format!("{label} failed at every row of the kind {kind:?} from the start, at last: {why}");
        self.memory.quarantine(plugin.identity(), &why);
        match self.load(file, source).await.and_then(|plugin| self.admit(file, plugin, &[])) {
            Ok(_) => {
                let mut slots = self.slots();
                let slot = slots.by_file.entry(file.to_owned()).or_default();
                slot.problem = Some((LoadError::Quarantined(why.clone()).to_string(), Some(plugin.identity().clone())));
                let serves = slot.active.as_deref().map_or("nothing", Plugin::label);
                count_reload(Reload::RolledBack);
                error!(reason = why, "rolled back {}: {serves} serves again", self.dir.join(file).display());
            }
            Err(error) => error!(reason = %error, "could not roll back {}", self.dir.join(file).display()),
        }
    }
}
