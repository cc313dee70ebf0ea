//! One generation: a loaded version of a plugin, which builds rows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::Build;
use super::bindings::PluginPre;
use super::bindings::exports::tidings::plugin::builder as wit;
use super::bindings::tidings::plugin::types::KindInfo;
use super::breaker::{Admission, Breaker, BreakerState, Failure};
use super::check::{LoadError, check_world, is_kind};
use super::compile::compile;
use super::engine::Engine;
use super::guest::Guest;
use super::inspect::inspect;
use super::instance::{Instance, Used, chain};
use super::limits::Limits;
use super::settings::Settings;
use super::source::{Identity, Source, settings_file};
use crate::clock::DatabaseClock;
use crate::event::{BuildError, BuiltEvent, Event, deadline_ms};
use crate::schedule::Schedule;
use crate::wake::Wake;

/// Wasmtime's words for an export of another type than ours.
const WRONG_TYPE: &str = "failed to convert function to given type";
/// Kinds of one plugin.
const KINDS: usize = 1_000;

/// One loaded version of a plugin.
pub struct Plugin {
    file: PathBuf,
    generation: u64,
    identity: Identity,
    digest: String,
    size: usize,
    label: Arc<str>,
    kinds: BTreeMap<String, Kind>,
    imports: Vec<String>,
    config: Arc<BTreeMap<String, String>>,
    limits: Limits,
    pre: PluginPre<Guest>,
    engine: Arc<Engine>,
    peak: Peak,
    /// What the registry should know of, and its bell.
    news: Mutex<Vec<News>>,
    bell: Arc<Wake>,
}

/// One kind that a plugin serves.
#[derive(Debug)]
pub struct Kind {
    /// One line for people.
    pub summary: String,
    /// A JSON Schema of the payload.
    pub payload_schema: Option<String>,
    /// An example payload, JSON text.
    pub example: Option<String>,
    breaker: Mutex<Breaker>,
}

/// The most that calls of one generation have used.
#[derive(Debug, Default)]
struct Peak {
    memory_bytes: AtomicUsize,
    cpu_ms: AtomicU64,
    output_bytes: AtomicUsize,
}

/// What became of a generation.
#[derive(Debug)]
pub(super) enum News {
    /// It has built its first row of this kind.
    Answered(String),
    /// It fails at everything of this kind, and has from the start; at last with this error.
    FailedFromTheStart(String, String),
}

/// One row, built apart from the queue.
#[derive(Debug)]
pub struct Trial {
    /// What became of it.
    pub outcome: Result<BuiltEvent, BuildError>,
    /// Wall-clock time of the start of the plugin and the call.
    pub took: Duration,
    /// Memory at its peak, in bytes.
    pub memory_bytes: usize,
    /// Instructions, if the engine counts them.
    pub fuel: Option<u64>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Plugin").field("label", &self.label).field("file", &self.file).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Reads `file`, with the settings in `settings` or else those beside it, and loads it apart from any daemon.
    ///
    /// # Errors
    ///
    /// When it could not serve.
    pub async fn open(engine: &Arc<Engine>, file: &Path, settings: Option<&Path>) -> Result<Self, LoadError> {
        let source = Source::read(file, settings)?;
        Self::load(engine, file, source, 0, Arc::default()).await
    }

    /// Compiles, links and describes `source`, which was read from `file`. `bell` is rung when there is news.
    pub(super) async fn load(
        engine: &Arc<Engine>,
        file: &Path,
        source: Source,
        generation: u64,
        bell: Arc<Wake>,
    ) -> Result<Self, LoadError> {
        let settings = Settings::parse(source.settings.as_deref().unwrap_or_default())
            .map_err(|reason| LoadError::Settings { file: settings_file(file), reason })?;
        let (identity, digest, size) = (source.identity(), source.digest().to_owned(), source.wasm.len());
        let bytes: Arc<[u8]> = source.wasm.into();
        let inspected = tokio::task::spawn_blocking({
            let bytes = Arc::clone(&bytes);
            move || inspect(&bytes)
        });
        let world = inspected.await.map_err(|panic| LoadError::Damaged(panic.to_string()))??;
        check_world(&world)?;
        let component = compile(engine, bytes).await?;
        let pre = engine.linker.instantiate_pre(&component).map_err(|error| LoadError::Link(chain(&error)))?;
        let pre = PluginPre::new(pre).map_err(|error| LoadError::Link(chain(&error)))?;
        let mut plugin = Self {
            // Until it has described itself, it is known by its file and its bytes.
            label: format!("{}@?+{}", file.file_stem().unwrap_or_default().to_string_lossy(), &digest[..8]).into(),
            file: file.to_owned(),
            generation,
            identity,
            digest,
            size,
            kinds: BTreeMap::new(),
            imports: world.imports,
            config: Arc::new(settings.config),
            limits: settings.limits,
            pre,
            engine: Arc::clone(engine),
            peak: Peak::default(),
            news: Mutex::default(),
            bell,
        };
        plugin.describe().await?;
        Ok(plugin)
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
        let info = described.await.map_err(|panic| LoadError::Describe(panic.to_string()))?;
        // Wasmtime compares the types of exported functions when it starts the component.
        let info = info.map_err(|text| match text.split_once(WRONG_TYPE) {
            Some((_, types)) => LoadError::Link(format!(
                "a function of its builder has another type: {}",
                types.trim_start_matches(": ")
            )),
            None => LoadError::Describe(text),
        })?;

        for (what, text) in [("name", &info.name), ("version", &info.version)] {
            if !(1..=100).contains(&text.len())
                || text.chars().any(|char| char.is_control() || char == '@' || char == '+' && what == "name")
            {
                return Err(LoadError::Description(format!(
                    "the {what} {:?}, which is not 1 to 100 printable bytes",
                    start(text)
                )));
            }
        }
        if info.kinds.is_empty() || info.kinds.len() > KINDS {
            return Err(LoadError::Description(format!("{} kinds, not 1 to {KINDS}", info.kinds.len())));
        }
        if let Some(other) = info.kinds.iter().find(|info| !is_kind(&info.kind)) {
            return Err(LoadError::Description(format!(
                "the kind {:?}, which does not match [a-z0-9][a-z0-9._-]{{0,99}}",
                start(&other.kind)
            )));
        }
        self.label = format!("{}@{}+{}", info.name, info.version, &self.digest[..8]).into();
        let kind = |info: KindInfo| Kind {
            summary: info.summary,
            payload_schema: info.payload_schema,
            example: info.example,
            breaker: Mutex::default(),
        };
        self.kinds = info.kinds.into_iter().map(|info| (info.kind.clone(), kind(info))).collect();
        Ok(())
    }

    /// The file it was loaded from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Which loaded version it is: counted from 1 over all plugins of a daemon.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Tells it and its settings from every other version.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The length of the file, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The kinds it serves, in alphabetical order.
    #[must_use]
    pub fn kinds(&self) -> &BTreeMap<String, Kind> {
        &self.kinds
    }

    /// The interfaces it imports.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.imports
    }

    /// What it may use.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The name that it gives itself.
    #[must_use]
    pub fn name(&self) -> &str {
        self.label.split('@').next().unwrap_or_default()
    }

    /// `name@version+digest8`.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The most that its calls have used: memory in bytes, CPU time in ms, output in bytes.
    #[must_use]
    pub fn peak(&self) -> (usize, u64, usize) {
        let Peak { memory_bytes, cpu_ms, output_bytes } = &self.peak;
        let relaxed = Ordering::Relaxed;
        (memory_bytes.load(relaxed), cpu_ms.load(relaxed), output_bytes.load(relaxed))
    }

    /// What has happened since this was asked last.
    pub(super) fn take_news(&self) -> Vec<News> {
        std::mem::take(&mut *self.news.lock().expect("nobody panics with it"))
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
        if let Some(kind) = self.kinds.get(&schedule.kind)
            && let Admission::Wait(after) = kind.breaker.lock().expect("nobody panics with it").admit(Instant::now())
        {
            let reason =
                format!("plugin {}: it fails at row after row, so this one waits until one succeeds", self.label);
            return Err(BuildError::Unavailable(reason, after));
        }
        let used = instance.is_some();
        let outcome = self.try_build(instance, schedule, clock.now_ms()).await;
        // What went wrong in a store that others had used before may be their doing, a leak for instance: a row is
        // blamed only for what it does in a fresh one.
        let outcome = match outcome {
            Err(BuildError::Failed(_)) if used => self.try_build(instance, schedule, clock.now_ms()).await,
            outcome => outcome,
        };
        if let Ok(built) = &outcome {
            let _ = bodies.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(built.event.body_len()))
            });
            self.peak.output_bytes.fetch_max(built.event.body_len(), Ordering::Relaxed);
        }
        self.count(schedule, &outcome);
        outcome
    }

    /// Tells the breaker, and the registry if it matters to it.
    fn count(&self, schedule: &Schedule, outcome: &Result<BuiltEvent, BuildError>) {
        let Some(kind) = self.kinds.get(&schedule.kind) else { return };
        let mut breaker = kind.breaker.lock().expect("nobody panics with it");
        let news = if let Err(BuildError::Failed(error)) = outcome {
            match breaker.failed(schedule.id, Instant::now()) {
                Failure::Counted => return,
                Failure::Opened => {
                    tracing::warn!(
                        plugin = &*self.label,
                        schedule.kind,
                        error,
                        "the breaker is open: rows of the kind wait until one succeeds"
                    );
                    return;
                }
                Failure::FromTheStart => News::FailedFromTheStart(schedule.kind.clone(), error.clone()),
            }
        } else {
            if breaker.state() != BreakerState::Closed {
                tracing::info!(plugin = &*self.label, schedule.kind, "the breaker is closed: a row succeeded");
            }
            breaker.answered();
            if breaker.answered > 1 {
                return;
            }
            News::Answered(schedule.kind.clone())
        };
        drop(breaker);
        self.news.lock().expect("nobody panics with it").push(news);
        self.bell.wake();
    }

    /// Builds one row in a fresh store at `now_ms`, apart from the queue, the breaker and the history.
    pub async fn try_row(self: &Arc<Self>, schedule: Schedule, now_ms: i64) -> Trial {
        let plugin = Arc::clone(self);
        let task = self.engine.guests().spawn(async move {
            let _measuring = plugin.engine.measure();
            let begun = Instant::now();
            let mut instance = None;
            let outcome = plugin.try_build(&mut instance, &schedule, now_ms).await;
            let took = begun.elapsed();
            let used = instance.as_ref().map(Instance::used).unwrap_or_default();
            Trial { outcome, took, memory_bytes: used.memory_bytes, fuel: used.fuel }
        });
        task.await.unwrap_or_else(|panic| Trial {
            outcome: Err(BuildError::Failed(panic.to_string())),
            took: Duration::ZERO,
            memory_bytes: 0,
            fuel: None,
        })
    }

    async fn try_build(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        now_ms: i64,
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
        let row = row(schedule, now_ms);
        let answer = alive
            .call(&self.limits, async |store, bindings| bindings.tidings_plugin_builder().call_build(store, &row).await)
            .await;
        let Used { memory_bytes, cpu_ms, .. } = alive.used();
        self.peak.memory_bytes.fetch_max(memory_bytes, Ordering::Relaxed);
        self.peak.cpu_ms.fetch_max(cpu_ms, Ordering::Relaxed);
        let answer = answer.map_err(failed)?;
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
        Ok(BuiltEvent { event, built_ms: now_ms, expires_ms, plugin: self.label.to_string() })
    }
}

impl Kind {
    /// The state of the breaker, and how many calls were answered and failed.
    #[must_use]
    pub fn breaker(&self) -> (BreakerState, u64, u64) {
        let breaker = self.breaker.lock().expect("nobody panics with it");
        (breaker.state(), breaker.answered, breaker.failed)
    }
}

/// The first characters of a text that may be endless.
fn start(text: &str) -> String {
    text.chars().take(120).collect()
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
    use super::super::engine::Metering;
    use super::*;

    #[tokio::test]
    async fn the_engine_sets_up_and_links_everything_it_offers() {
        let engine = Engine::new(None, Metering::Time).expect("an engine");
        let refused = Plugin::open(&engine, Path::new("/nonexistent.wasm"), None).await.err();
        assert!(matches!(refused, Some(LoadError::Read(_))), "{refused:?}");
    }
}
