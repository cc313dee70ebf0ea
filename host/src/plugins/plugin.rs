//! One plugin: from a file to something that builds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use wasmtime::component::Component;

use super::Build;
use super::bindings::PluginPre;
use super::bindings::exports::tidings::plugin::builder as wit;
use super::check::{LoadError, check_world, is_kind, other_than_component, read};
use super::engine::Engine;
use super::guest::Guest;
use super::instance::{Instance, chain};
use super::limits::Limits;
use super::settings::Settings;
use crate::clock::DatabaseClock;
use crate::event::{BuildError, BuiltEvent, Event, deadline_ms, hex};
use crate::schedule::Schedule;

/// Kinds of one plugin.
const KINDS: usize = 1_000;

/// One loaded version of a plugin.
pub struct Plugin {
    file: PathBuf,
    label: Arc<str>,
    kinds: Vec<String>,
    config: Arc<BTreeMap<String, String>>,
    limits: Limits,
    pre: PluginPre<Guest>,
    engine: Arc<Engine>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Plugin").field("label", &self.label).field("file", &self.file).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Reads, compiles, links and describes the plugin in `file`.
    ///
    /// # Errors
    ///
    /// When it cannot serve.
    pub async fn load(engine: &Arc<Engine>, file: &Path) -> Result<Self, LoadError> {
        let (engine, file) = (Arc::clone(engine), file.to_owned());
        // Reading and compiling take their time: not on a thread that others wait for.
        let compiled = tokio::task::spawn_blocking(move || Self::compile(engine, file)).await;
        let mut plugin = compiled.map_err(|panic| LoadError::Compile(panic.to_string()))??;
        plugin.describe().await?;
        Ok(plugin)
    }

    fn compile(engine: Arc<Engine>, file: PathBuf) -> Result<Self, LoadError> {
        let settings = Settings::beside(&file)?;
        let bytes = read(&file)?;
        if let Some(what) = other_than_component(&bytes) {
            return Err(LoadError::NotAComponent(what));
        }
        let component =
            Component::from_binary(&engine.wasmtime, &bytes).map_err(|error| LoadError::Compile(chain(&error)))?;
        check_world(&engine, &component)?;
        let pre = engine.linker.instantiate_pre(&component).map_err(|error| LoadError::Link(chain(&error)))?;
        let pre = PluginPre::new(pre).map_err(|error| LoadError::Link(chain(&error)))?;
        // Until it has described itself, it is known by its file and its bytes.
        let digest8 = hex(&Sha256::digest(&bytes)[..4]);
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            label: format!("{stem}@?+{digest8}").into(),
            kinds: Vec::new(),
            config: Arc::new(settings.config),
            limits: settings.limits,
            pre,
            file,
            engine,
        })
    }

    async fn describe(&mut self) -> Result<(), LoadError> {
        let (engine, pre, limits) = (Arc::clone(&self.engine), self.pre.clone(), self.limits);
        let (label, config) = (Arc::clone(&self.label), Arc::clone(&self.config));
        let described = self.engine.guests().spawn(async move {
            let _measuring = engine.measure();
            let mut instance = Instance::new(&engine, &pre, label, config, &limits).await?;
            instance
                .call(&limits, async |store, bindings| bindings.tidings_plugin_builder().call_describe(store).await)
                .await
        });
        let info =
            described.await.map_err(|panic| LoadError::Describe(panic.to_string()))?.map_err(LoadError::Describe)?;

        for (what, text) in [("name", &info.name), ("version", &info.version)] {
            if !(1..=100).contains(&text.len())
                || text.chars().any(|char| char.is_control() || char == '@' || char == '+' && what == "name")
            {
                return Err(LoadError::Description(format!(
                    "the {what} {text:?}, which is not 1 to 100 printable bytes"
                )));
            }
        }
        if info.kinds.is_empty() || info.kinds.len() > KINDS {
            return Err(LoadError::Description(format!("{} kinds, not 1 to {KINDS}", info.kinds.len())));
        }
        for kind in &info.kinds {
            if !is_kind(&kind.kind) {
                let shown: String = kind.kind.chars().take(120).collect();
                return Err(LoadError::Description(format!(
                    "the kind {shown:?}, which does not match [a-z0-9][a-z0-9._-]{{0,99}}"
                )));
            }
        }
        let digest8 = self.label.rsplit('+').next().unwrap_or_default();
        self.label = format!("{}@{}+{digest8}", info.name, info.version).into();
        self.kinds = info.kinds.into_iter().map(|kind| kind.kind).collect();
        self.kinds.sort();
        self.kinds.dedup();
        Ok(())
    }

    /// The file it was loaded from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The kinds it serves.
    #[must_use]
    pub fn kinds(&self) -> &[String] {
        &self.kinds
    }

    /// `name@version+digest8`.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Builds `rows` one after the other, on the guests' threads. Rows that were not reached before `until`, or after
    /// `bodies` (the bytes left for bodies) was used up, have no outcome.
    pub(super) async fn build(
        self: Arc<Self>,
        rows: Vec<Schedule>,
        clock: DatabaseClock,
        until: Instant,
        bodies: Arc<AtomicUsize>,
    ) -> Vec<Build> {
        let plugin = Arc::clone(&self);
        let task = self.engine.guests().spawn(async move {
            let _measuring = plugin.engine.measure();
            let mut instance = None;
            let mut builds = Vec::with_capacity(rows.len());
            for schedule in rows {
                let enough = Instant::now() >= until || bodies.load(Ordering::Relaxed) == 0;
                let outcome =
                    if enough { None } else { Some(plugin.build_row(&mut instance, &schedule, clock, &bodies).await) };
                builds.push(Build { schedule, plugin: plugin.label.to_string(), outcome });
            }
            builds
        });
        // A panic of ours: the rows stay as they are, and are claimed again.
        task.await.unwrap_or_else(|panic| {
            tracing::error!(
                error = &panic as &dyn std::error::Error,
                plugin = &*self.label,
                "a build panicked, its rows stay"
            );
            Vec::new()
        })
    }

    async fn build_row(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        clock: DatabaseClock,
        bodies: &AtomicUsize,
    ) -> Result<BuiltEvent, BuildError> {
        let used = instance.is_some();
        let outcome = self.try_build(instance, schedule, clock).await;
        // What went wrong in a store that others had used before may be their doing, a leak for instance: a row is
        // blamed only for what it does in a fresh one.
        let outcome = match outcome {
            Err(BuildError::Failed(_)) if used => self.try_build(instance, schedule, clock).await,
            outcome => outcome,
        };
        if let Ok(built) = &outcome {
            let _ = bodies.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(built.event.body_len()))
            });
        }
        outcome
    }

    async fn try_build(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        clock: DatabaseClock,
    ) -> Result<BuiltEvent, BuildError> {
        let failed = |text: String| BuildError::Failed(format!("plugin {}: {text}", self.label));
        let mut alive = match instance.take() {
            Some(alive) => alive,
            None => {
                Instance::new(&self.engine, &self.pre, Arc::clone(&self.label), Arc::clone(&self.config), &self.limits)
                    .await
                    .map_err(failed)?
            }
        };
        let now_ms = clock.now_ms();
        let row = row(schedule, now_ms);
        let answer = alive
            .call(&self.limits, async |store, bindings| bindings.tidings_plugin_builder().call_build(store, &row).await)
            .await
            .map_err(failed)?;
        // It answered: it is well, whatever it said.
        *instance = Some(alive);
        let built = answer.map_err(|error| match error {
            wit::BuildError::Invalid(reason) | wit::BuildError::Other(reason) => BuildError::Invalid(reason),
            wit::BuildError::Retry(retry) => BuildError::Retry(retry.reason, retry.after_ms),
            wit::BuildError::Skip(reason) => BuildError::Skip(reason),
        })?;
        let wit::Built { event, ttl_ms } = built;
        let event = Event::new(event.routing_key, event.content_type, event.body, event.headers)
            .map_err(|error| failed(format!("its event cannot be published: {error}")))?;
        let expires_ms = ttl_ms.map(|ttl_ms| deadline_ms(now_ms, ttl_ms));
        Ok(BuiltEvent { event, expires_ms, plugin: self.label.to_string() })
    }
}

/// The row as the plugin sees it.
fn row(schedule: &Schedule, now_ms: i64) -> wit::Schedule {
    let unsigned = |ms: i64| u64::try_from(ms).unwrap_or(0);
    wit::Schedule {
        id: schedule.id.to_string(),
        kind: schedule.kind.clone(),
        key: schedule.key.clone(),
        subject: schedule.subject.clone(),
        due_ms: unsigned(schedule.due_ms()),
        now_ms: unsigned(now_ms),
        expires_ms: schedule.expires_ms().map(unsigned),
        attempt: schedule.attempt(),
        payload: schedule.payload.clone(),
        headers: schedule.headers.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_engine_sets_up_and_links_everything_it_offers() {
        let engine = Engine::new().expect("an engine");
        let refused = Plugin::load(&engine, Path::new("/nonexistent.wasm")).await.err();
        assert!(matches!(refused, Some(LoadError::Read(_))), "{refused:?}");
    }
}
