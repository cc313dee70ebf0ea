//! One plugin: from a file to something that builds, and its calls, each under its limits.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use wasmtime::component::Component;
use wasmtime::{Store, Trap};

use super::Build;
use super::bindings::exports::tidings::plugin::builder as wit;
use super::bindings::{Plugin as Bindings, PluginPre};
use super::engine::{Engine, OFFERED};
use super::guest::Guest;
use super::limits::Limits;
use super::settings::Settings;
use crate::clock::DatabaseClock;
use crate::event::{BuildError, BuiltEvent, Event, deadline_ms, hex};
use crate::schedule::Schedule;

/// A larger file is not read. Interpreters of other languages are 10 to 40 MiB.
const FILE_BYTES: u64 = 64 * 1024 * 1024;
/// Kinds of one plugin.
const KINDS: usize = 1_000;
/// The interface that a plugin must export.
const BUILDER: &str = "tidings:plugin/builder@0.1.0";

/// Why a file does not serve.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("it cannot be read: {0}")]
    Read(std::io::Error),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it has {0} bytes, more than {FILE_BYTES}")]
    TooLarge(u64),
    #[error(
        "it is {0}, not a WebAssembly component; build it with `cargo build --target wasm32-wasip2` or `cargo component build`"
    )]
    NotAComponent(&'static str),
    #[error("{} cannot be used: {reason}", .file.display())]
    Settings { file: PathBuf, reason: String },
    #[error("it is damaged or uses what this daemon does not know: {0}")]
    Compile(String),
    #[error("it imports {0}, which plugins are not given: they have no network, files, environment or clock")]
    Imports(String),
    #[error("it does not export {BUILDER}{0}")]
    NoBuilder(String),
    #[error("it does not fit wit/plugin.wit: {0}")]
    Link(String),
    #[error("its describe() failed: {0}")]
    Describe(String),
    #[error("its describe() names {0}")]
    Description(String),
    #[error("the kind {kind:?} is served by {} already", .by.display())]
    KindTaken { kind: String, by: PathBuf },
}

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

/// A plugin in its store, alive until its first failure.
struct Instance {
    store: Store<Guest>,
    bindings: Bindings,
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

impl Instance {
    async fn new(
        engine: &Engine,
        pre: &PluginPre<Guest>,
        label: Arc<str>,
        config: Arc<BTreeMap<String, String>>,
        limits: &Limits,
    ) -> Result<Self, String> {
        let mut store = Guest::store(engine, label, config, limits);
        match timeout(limits.wall(), pre.instantiate_async(&mut store)).await {
            Ok(Ok(bindings)) => Ok(Self { store, bindings }),
            Ok(Err(error)) => Err(format!("while starting, {}", what_happened(&error, store.data(), limits))),
            Err(_) => Err(format!("while starting, it took longer than {} ms (wall-ms)", limits.wall_ms)),
        }
    }

    /// One call under the limits. After an error the instance must not be used again.
    async fn call<T>(
        &mut self,
        limits: &Limits,
        call: impl AsyncFnOnce(&mut Store<Guest>, &Bindings) -> wasmtime::Result<T>,
    ) -> Result<T, String> {
        self.store.data_mut().begin_call();
        match timeout(limits.wall(), call(&mut self.store, &self.bindings)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(what_happened(&error, self.store.data(), limits)),
            Err(_) => Err(format!("it took longer than {} ms (wall-ms)", limits.wall_ms)),
        }
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

/// Reads a regular file that is not too large.
fn read(file: &Path) -> Result<Vec<u8>, LoadError> {
    let metadata = std::fs::metadata(file).map_err(LoadError::Read)?;
    if !metadata.is_file() {
        return Err(LoadError::NotAFile);
    }
    if metadata.len() > FILE_BYTES {
        return Err(LoadError::TooLarge(metadata.len()));
    }
    std::fs::read(file).map_err(LoadError::Read)
}

/// What the bytes are, if they are not a component.
fn other_than_component(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [] => Some("empty"),
        // The magic number, the version of the component format, and its layer.
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => None,
        [0, b'a', b's', b'm', _, _, 0, 0, ..] => Some("a core module"),
        [0x7f, b'E', b'L', b'F', ..] => Some("native or precompiled code"),
        [b'(', ..] => Some("WebAssembly text"),
        [0, b'a', b's', b'm', ..] => Some("cut off"),
        _ => Some("something else"),
    }
}

/// Checks by name what is imported and exported, since the linker's own words are about types.
fn check_world(engine: &Engine, component: &Component) -> Result<(), LoadError> {
    let component_type = component.component_type();
    let missing: Vec<String> = component_type
        .imports(&engine.wasmtime)
        .map(|(name, _)| name.to_owned())
        .filter(|name| !is_offered(name))
        .collect();
    if !missing.is_empty() {
        return Err(LoadError::Imports(missing.join(", ")));
    }
    if component.get_export_index(None, BUILDER).is_none() {
        let exports: Vec<&str> = component_type.exports(&engine.wasmtime).map(|(name, _)| name).collect();
        let exported = if exports.is_empty() {
            ", nor anything else".to_owned()
        } else {
            format!(", only {}", exports.join(", "))
        };
        return Err(LoadError::NoBuilder(exported));
    }
    Ok(())
}

fn is_offered(import: &str) -> bool {
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    OFFERED.iter().any(|(offered, track)| interface == *offered && version.starts_with(track))
}

fn is_kind(kind: &str) -> bool {
    let mut bytes = kind.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    first
        && kind.len() <= 100
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Why a call ended in an error, in the words of the plugin's author.
fn what_happened(error: &wasmtime::Error, guest: &Guest, limits: &Limits) -> String {
    let mut text = if let Some(blown) = &guest.limiter.blown {
        blown.clone()
    } else if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
        format!("it called exit({})", exit.0)
    } else {
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => format!("it used more than {} ms of CPU time (cpu-ms)", limits.cpu_ms),
            Some(Trap::StackOverflow) => "its stack overflowed (1 MiB), by a recursion perhaps".to_owned(),
            Some(Trap::UnreachableCodeReached) => "it trapped (unreachable), as a panic does".to_owned(),
            Some(trap) => format!("it trapped ({trap})"),
            // Wasmtime has no public type for it.
            None if chain(error).contains("too much data is being copied") => {
                format!("it handed more than {} KiB to the host in one call (output-kib)", limits.output_kib)
            }
            None => format!("it broke the contract: {}", chain(error)),
        }
    };
    let last_words = guest.last_words();
    if !last_words.is_empty() {
        write!(text, "; it wrote: {last_words}").expect("a String takes everything");
    }
    text
}

/// An error and its causes on one line, without the backtrace.
fn chain(error: &wasmtime::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .filter(|cause| !cause.starts_with("error while executing"))
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_component_is_named() {
        assert_eq!(other_than_component(b""), Some("empty"));
        assert_eq!(other_than_component(b"\0asm\x01\0\0\0"), Some("a core module"));
        assert_eq!(other_than_component(b"\0asm\x0d\0\x01\0"), None);
        assert_eq!(other_than_component(b"\0asm\x0d"), Some("cut off"));
        assert_eq!(other_than_component(b"(component)"), Some("WebAssembly text"));
        assert_eq!(other_than_component(b"\x7fELF"), Some("native or precompiled code"));
        assert_eq!(other_than_component(b"MZ"), Some("something else"));
    }

    #[test]
    fn only_inert_interfaces_of_the_known_versions_are_offered() {
        for name in ["tidings:plugin/host@0.1.0", "wasi:cli/stderr@0.2.12", "wasi:random/random@0.2.0"] {
            assert!(is_offered(name), "{name}");
        }
        for name in [
            "wasi:sockets/tcp@0.2.0",
            "wasi:http/types@0.2.0",
            "wasi:cli/stderr@0.3.0",
            "tidings:plugin/host@0.9.0",
            "env",
        ] {
            assert!(!is_offered(name), "{name}");
        }
    }

    #[test]
    fn a_kind_is_what_the_table_takes() {
        for kind in ["a", "0", "game-reminder", "a.b_c-d", &"k".repeat(100)] {
            assert!(is_kind(kind), "{kind}");
        }
        for kind in ["", "-a", "A", "a b", "a/b", "é", &"k".repeat(101)] {
            assert!(!is_kind(kind), "{kind}");
        }
    }

    #[tokio::test]
    async fn the_engine_sets_up_and_links_everything_it_offers() {
        let engine = Engine::new().expect("an engine");
        let refused = Plugin::load(&engine, Path::new("/nonexistent.wasm")).await.err();
        assert!(matches!(refused, Some(LoadError::Read(_))), "{refused:?}");
    }
}
