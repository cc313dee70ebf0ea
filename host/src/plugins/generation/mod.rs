//! One generation: a loaded version of a plugin, which builds rows.

pub(in crate::plugins) mod breaker;
mod build;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::model::wake::Wake;
use crate::plugins::loading::check::{check_description, check_world};
use crate::plugins::loading::compile::compile;
use crate::plugins::loading::inspect::inspect;
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::settings::Settings;
use crate::plugins::loading::source::{Identity, Source, settings_file};
use crate::plugins::runtime::bindings::PluginPre;
use crate::plugins::runtime::bindings::tidings::plugin::types::KindInfo;
use crate::plugins::runtime::engine::Engine;
use crate::plugins::runtime::host::Guest;
use crate::plugins::runtime::instance::{Instance, chain};
use crate::plugins::runtime::limits::Limits;
use crate::telemetry::Calls;
use breaker::{Breaker, BreakerState};

pub use build::TestRun;

/// Wasmtime's words for an export of another type than ours.
const WRONG_TYPE: &str = "failed to convert function to given type";

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
    /// Started after the last batch for the next one, which may be of a single row and in a hurry.
    spare: Mutex<Option<Instance>>,
    /// What the registry should know of, and its feedback_wake.
    feedback: Mutex<Vec<Feedback>>,
    feedback_wake: Arc<Wake>,
}

/// One kind that a plugin serves.
pub struct Kind {
    /// One line for people.
    pub summary: String,
    /// A JSON Schema of the payload.
    pub payload_schema: Option<String>,
    /// An example payload, JSON text.
    pub example: Option<String>,
    breaker: Mutex<Breaker>,
    /// From the moment it serves: what does not serve must not be seen among the metrics.
    calls: OnceLock<Calls>,
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
pub(super) enum Feedback {
    /// It has built its first row of this kind.
    Answered(String),
    /// It fails at everything of this kind, and has from the start; at last with this error.
    FailedFromTheStart(String, String),
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
        Self::load(engine, file, source, Arc::default()).await
    }

    /// Compiles, links and describes `source`, which was read from `file`. `feedback_wake` is rung when there is feedback.
    pub(super) async fn load(
        engine: &Arc<Engine>,
        file: &Path,
        source: Source,
        feedback_wake: Arc<Wake>,
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
            generation: 0,
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
            spare: Mutex::default(),
            feedback: Mutex::default(),
            feedback_wake,
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
            let described = instance
                .call(&limits, async |store, bindings| bindings.tidings_plugin_builder().call_describe(store).await)
                .await;
            described.map_err(|error| error.text)
        });
        let info = described.await.map_err(|panic| LoadError::Describe(panic.to_string()))?;
        // Wasmtime compares the types of exported functions when it starts the component.
        let info = info.map_err(|text: String| match text.split_once(WRONG_TYPE) {
            Some((_, types)) => LoadError::Link(format!(
                "a function of its builder has another type: {}",
                types.trim_start_matches(": ")
            )),
            None => LoadError::Describe(text),
        })?;

        let kinds: Vec<&str> = info.kinds.iter().map(|info| info.kind.as_str()).collect();
        check_description(&info.name, &info.version, &kinds)?;
        self.label = format!("{}@{}+{}", info.name, info.version, &self.digest[..8]).into();
        let kind = |info: KindInfo| Kind {
            summary: info.summary,
            payload_schema: info.payload_schema,
            example: info.example,
            breaker: Mutex::default(),
            calls: OnceLock::new(),
        };
        self.kinds = info.kinds.into_iter().map(|info| (info.kind.clone(), kind(info))).collect();
        Ok(())
    }

    /// The file it was loaded from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// It serves, as this generation.
    pub(super) fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// RowRef loaded version it is: counted from 1 over all plugins of a daemon; 0 = it does not serve.
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

    /// From now on its calls are seen among the metrics, none so far.
    pub(super) fn show_calls(&self) {
        for (name, kind) in &self.kinds {
            kind.calls(self.name(), name);
        }
    }

    /// Notes what has happened.
    pub(super) fn tell(&self, feedback: Feedback) {
        self.feedback.lock().expect("nobody panics with it").push(feedback);
    }

    /// What has happened since this was asked last.
    pub(super) fn take_feedback(&self) -> Vec<Feedback> {
        std::mem::take(&mut *self.feedback.lock().expect("nobody panics with it"))
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Kind").field("summary", &self.summary).finish_non_exhaustive()
    }
}

impl Kind {
    /// Where its calls are counted; `name` is its own.
    fn calls(&self, plugin: &str, name: &str) -> &Calls {
        self.calls.get_or_init(|| Calls::of(plugin, name))
    }

    /// The state of the breaker, and how many calls were answered and failed.
    #[must_use]
    pub fn breaker(&self) -> (BreakerState, u64, u64) {
        let breaker = self.breaker.lock().expect("nobody panics with it");
        (breaker.state(), breaker.answered, breaker.failed)
    }

    /// What the last call that failed said, and how long ago; `None` = none has.
    #[must_use]
    pub fn last_error(&self) -> Option<(Duration, String)> {
        let breaker = self.breaker.lock().expect("nobody panics with it");
        breaker.last_error.as_ref().map(|(at, error)| (at.elapsed(), error.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::runtime::engine::Metering;

    #[tokio::test]
    async fn the_engine_sets_up_and_links_everything_it_offers() {
        let engine = Engine::new(None, Metering::Time).expect("an engine");
        let refused = Plugin::open(&engine, Path::new("/nonexistent.wasm"), None).await.err();
        assert!(matches!(refused, Some(LoadError::Read(_))), "{refused:?}");
    }
}
