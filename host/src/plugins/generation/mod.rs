//! One generation: a loaded version of a plugin, which builds events for rows.
//!
//! Must never count a failure against a row for what earlier rows did in the same store, and must never let the
//! failures of one kind hold up another kind.
//!
//! To change it, know that
//!
//! - each kind of each generation has a breaker of its own. It opens only when five different rows have failed with no
//!   answer in between, so one bad row spends its own attempts and delays no other row. Rows that wait for an open
//!   breaker spend no attempts;
//! - a row that fails in a store which earlier rows have used is built again in a fresh store, and only a failure there
//!   counts;
//! - a generation does not know the registry. It leaves [`Feedback`] when it first answers for a row of a kind, and
//!   when it has failed for every row of a kind from its start; the registry keeps the version for a rollback, or rolls
//!   it back.

pub(in crate::plugins) mod breaker;
mod build;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::wake::Wake;
use crate::plugins::loading::check::{check_description, check_world};
use crate::plugins::loading::compile::compile;
use crate::plugins::loading::inspect::inspect;
use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::settings::Settings;
use crate::plugins::loading::source::{Identity, Source, settings_path};
use crate::plugins::runtime::bindings::PluginPre;
use crate::plugins::runtime::bindings::tidings::plugin::types::KindInfo;
use crate::plugins::runtime::engine::Engine;
use crate::plugins::runtime::host::Guest;
use crate::plugins::runtime::instance::{Instance, error_chain};
use crate::plugins::runtime::limits::Limits;
use crate::telemetry::Calls;
use breaker::{Breaker, BreakerState};

pub use build::TestRun;

/// The beginning of wasmtime's error when an exported function has another type than the contract's.
const EXPORT_TYPE_MISMATCH: &str = "failed to convert function to given type";

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
    peak: PeakUsage,
    /// An instance for the next batch, so that it need not wait for a start.
    spare_instance: Mutex<Option<Instance>>,
    /// Until then, no rows are built on the daemon's own thread.
    slow_until: Mutex<Instant>,
    /// Feedback that the registry has not taken yet.
    feedback: Mutex<Vec<Feedback>>,
    /// Wakes the registry's watcher.
    feedback_wake: Arc<Wake>,
}

/// One kind that a plugin serves.
pub struct Kind {
    /// A line about the kind, for people.
    pub summary: String,
    /// A JSON Schema of the payload.
    pub payload_schema: Option<String>,
    /// An example payload, as JSON text.
    pub example: Option<String>,
    breaker: Mutex<Breaker>,
    /// The metrics of its calls. They are registered only when the plugin begins to serve, so that a plugin that was
    /// refused does not appear in them.
    call_metrics: OnceLock<Calls>,
}

/// The most that a call of one generation has used.
#[derive(Debug, Default)]
struct PeakUsage {
    memory_bytes: AtomicUsize,
    cpu_ms: AtomicU64,
    output_bytes: AtomicUsize,
}

/// An event in the life of a generation that the registry must handle.
#[derive(Debug)]
pub(super) enum Feedback {
    /// The generation has answered for its first row of this kind.
    FirstAnswer(String),
    /// The generation has failed for every row of this kind (the first field) from its start, at last with this error
    /// (the second).
    FailedFromTheStart(String, String),
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Plugin").field("label", &self.label).field("file", &self.file).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Reads and loads `file` outside the daemon, with the settings in the file `settings`, or in NAME.toml beside
    /// `file` if `settings` is `None`.
    ///
    /// # Errors
    ///
    /// When the daemon would refuse the plugin.
    pub async fn open(engine: &Arc<Engine>, file: &Path, settings: Option<&Path>) -> Result<Self, LoadError> {
        let source = Source::read(file, settings)?;
        Self::load(engine, file, source, Arc::default()).await
    }

    /// Compiles and links `source`, which was read from `file`, and calls `describe`. `feedback_wake` is woken when
    /// there is feedback.
    pub(super) async fn load(
        engine: &Arc<Engine>,
        file: &Path,
        source: Source,
        feedback_wake: Arc<Wake>,
    ) -> Result<Self, LoadError> {
        let settings = Settings::parse(source.settings.as_deref().unwrap_or_default())
            .map_err(|reason| LoadError::Settings { file: settings_path(file), reason })?;
        let (identity, digest, size) = (source.identity(), source.digest().to_owned(), source.wasm.len());
        let bytes: Arc<[u8]> = source.wasm.into();
        let inspected = tokio::task::spawn_blocking({
            let bytes = Arc::clone(&bytes);
            move || inspect(&bytes)
        });
        let world = inspected.await.map_err(|panic| LoadError::Damaged(panic.to_string()))??;
        check_world(&world)?;
        let component = compile(engine, bytes).await?;
        let pre = engine.linker.instantiate_pre(&component).map_err(|error| LoadError::Link(error_chain(&error)))?;
        let pre = PluginPre::new(pre).map_err(|error| LoadError::Link(error_chain(&error)))?;
        let mut plugin = Self {
            // Until `describe` has answered, the label has the name of the file and no version.
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
            peak: PeakUsage::default(),
            spare_instance: Mutex::default(),
            slow_until: Mutex::new(Instant::now()),
            feedback: Mutex::default(),
            feedback_wake,
        };
        plugin.describe().await?;
        Ok(plugin)
    }

    /// Calls the plugin's `describe`, checks the answer, and takes over the label and the kinds.
    async fn describe(&mut self) -> Result<(), LoadError> {
        let (engine, pre, limits) = (Arc::clone(&self.engine), self.pre.clone(), self.limits);
        let (label, config) = (Arc::clone(&self.label), Arc::clone(&self.config));
        let described = self.engine.guest_runtime().spawn(async move {
            let _ticking = engine.keep_ticking();
            let mut instance = Instance::new(&engine, &pre, label, config, &limits).await?;
            let described = instance
                .call(&limits, async |store, bindings| bindings.tidings_plugin_builder().call_describe(store).await)
                .await;
            described.map_err(|error| error.text)
        });
        let info = described.await.map_err(|panic| LoadError::Describe(panic.to_string()))?;
        // Wasmtime compares the types of exported functions only when it starts the component.
        let info = info.map_err(|text: String| match text.split_once(EXPORT_TYPE_MISMATCH) {
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
            call_metrics: OnceLock::new(),
        };
        self.kinds = info.kinds.into_iter().map(|info| (info.kind.clone(), kind(info))).collect();
        Ok(())
    }

    /// The file from which the plugin was loaded.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Sets the number of the generation, when the plugin begins to serve.
    pub(super) fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// The number of the generation, counted from 1 over all plugins of a daemon; 0 = it does not serve.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Identifies the version: the component and its settings.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The length of the file, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The kinds that the plugin serves, in alphabetical order.
    #[must_use]
    pub fn kinds(&self) -> &BTreeMap<String, Kind> {
        &self.kinds
    }

    /// The names of the component's imports.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.imports
    }

    /// The limits of its calls.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The name that the plugin's `describe` has given.
    #[must_use]
    pub fn name(&self) -> &str {
        self.label.split('@').next().unwrap_or_default()
    }

    /// `name@version+digest8`.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The most that a call has used: memory in bytes, CPU time in ms, output in bytes.
    #[must_use]
    pub fn peak(&self) -> (usize, u64, usize) {
        let PeakUsage { memory_bytes, cpu_ms, output_bytes } = &self.peak;
        let relaxed = Ordering::Relaxed;
        (memory_bytes.load(relaxed), cpu_ms.load(relaxed), output_bytes.load(relaxed))
    }

    /// Registers the metrics of its calls, which begin at zero.
    pub(super) fn register_call_metrics(&self) {
        for (name, kind) in &self.kinds {
            kind.call_metrics(self.name(), name);
        }
    }

    /// Leaves feedback for the registry.
    pub(super) fn push_feedback(&self, feedback: Feedback) {
        self.feedback.lock().expect("no thread panics with this lock").push(feedback);
    }

    /// Takes the feedback that was left since the last time.
    pub(super) fn take_feedback(&self) -> Vec<Feedback> {
        std::mem::take(&mut *self.feedback.lock().expect("no thread panics with this lock"))
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Kind").field("summary", &self.summary).finish_non_exhaustive()
    }
}

impl Kind {
    /// The metrics of the kind's calls, registered if they are not yet. `name` is the name of the kind.
    fn call_metrics(&self, plugin: &str, name: &str) -> &Calls {
        self.call_metrics.get_or_init(|| Calls::of(plugin, name))
    }

    /// The state of the breaker, and how many calls were answered and how many failed.
    #[must_use]
    pub fn breaker(&self) -> (BreakerState, u64, u64) {
        let breaker = self.breaker.lock().expect("no thread panics with this lock");
        (breaker.state(), breaker.answered_calls, breaker.failed_calls)
    }

    /// How long ago the last call failed, and its error; `None` = no call has failed.
    #[must_use]
    pub fn last_error(&self) -> Option<(Duration, String)> {
        let breaker = self.breaker.lock().expect("no thread panics with this lock");
        breaker.last_error.as_ref().map(|(at, error)| (at.elapsed(), error.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::runtime::engine::Metering;

    #[tokio::test]
    async fn the_engine_links_all_its_interfaces_and_refuses_a_missing_file() {
        let engine = Engine::new(None, Metering::Time).expect("an engine");
        let refused = Plugin::open(&engine, Path::new("/nonexistent.wasm"), None).await.err();
        assert!(matches!(refused, Some(LoadError::Read(_))), "{refused:?}");
    }
}
