//! What all plugins share: the wasmtime engine, the interfaces that are linked to every plugin, the thread that
//! measures CPU time, and the tokio runtime in which guests run.
//!
//! Must never link an interface that reaches outside the daemon.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use thiserror::Error;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;
use wasmtime::component::{HasData, Linker, ResourceTable};
use wasmtime::{Cache, CacheConfig, Config, EngineWeak, Strategy};
use wasmtime_wasi::WasiView as _;

use crate::plugins::runtime::bindings;
use crate::plugins::runtime::host::Guest;
use crate::plugins::runtime::limits::TICK;
use crate::plugins::state::StateDir;

/// The stack of a plugin's own function calls. A deeper recursion traps.
const MAX_STACK_BYTES: usize = 1 << 20;

/// How many ticks without a guest the ticker's thread goes on. Rows that come within that time need not wake it each time.
const IDLE_TICKS: u32 = 2;

/// The compiled code in wasmtime's cache. Beyond that, wasmtime removes the code that was used least recently.
const MAX_CACHE_BYTES: u64 = 1 << 30;

/// The interfaces that are linked, each with the beginning of the versions that fit. The interfaces of WASI are linked
/// because ordinary toolchains import them, but nothing is behind them. Sockets and HTTP are not linked, so a plugin
/// that imports them is refused when it is loaded.
pub(in crate::plugins) const LINKED_INTERFACES: [(&str, &str); 22] = [
    ("tidings:plugin/types", "0.1."),
    ("tidings:plugin/host", "0.1."),
    ("wasi:cli/environment", "0.2."),
    ("wasi:cli/exit", "0.2."),
    ("wasi:cli/stdin", "0.2."),
    ("wasi:cli/stdout", "0.2."),
    ("wasi:cli/stderr", "0.2."),
    ("wasi:cli/terminal-input", "0.2."),
    ("wasi:cli/terminal-output", "0.2."),
    ("wasi:cli/terminal-stdin", "0.2."),
    ("wasi:cli/terminal-stdout", "0.2."),
    ("wasi:cli/terminal-stderr", "0.2."),
    ("wasi:clocks/monotonic-clock", "0.2."),
    ("wasi:clocks/wall-clock", "0.2."),
    ("wasi:filesystem/preopens", "0.2."),
    ("wasi:filesystem/types", "0.2."),
    ("wasi:io/error", "0.2."),
    ("wasi:io/poll", "0.2."),
    ("wasi:io/streams", "0.2."),
    ("wasi:random/insecure", "0.2."),
    ("wasi:random/insecure-seed", "0.2."),
    ("wasi:random/random", "0.2."),
];

/// Why plugins cannot run here.
#[derive(Debug, Error)]
pub enum EngineError {
    /// Wasmtime could not be set up, for instance because it does not support this machine.
    #[error("could not set up WebAssembly: {0}")]
    WebAssembly(String),
    /// A thread could not be started.
    #[error("could not start a thread for plugins")]
    Threads(#[from] std::io::Error),
}

/// How the work of a plugin is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metering {
    /// By time, which costs almost nothing.
    Time,
    /// By time, and by counting instructions, of which a call needs the same number on every machine. Guests run at
    /// half the speed. For `tidings plugin test`.
    Fuel,
}

impl Metering {
    pub(in crate::plugins) fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Fuel => "fuel",
        }
    }

    pub(in crate::plugins) fn from_name(name: &str) -> Option<Self> {
        [Self::Time, Self::Fuel].into_iter().find(|metering| metering.name() == name)
    }
}

/// Makes a wasmtime engine. The daemon and the child process that compiles must use the same configuration, since
/// wasmtime finds code in the cache only under the configuration with which it was compiled.
pub(in crate::plugins) fn wasmtime_engine(
    cache: Option<Cache>,
    metering: Metering,
) -> Result<wasmtime::Engine, String> {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        .epoch_interruption(true)
        .consume_fuel(metering == Metering::Fuel)
        .max_wasm_stack(MAX_STACK_BYTES)
        // Host functions run on the same stack and need the rest of it.
        .async_stack_size(MAX_STACK_BYTES * 4)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false);
    config.cache(cache);
    wasmtime::Engine::new(&config).map_err(|error| format!("{error:#}"))
}

/// Opens wasmtime's cache in `dir`.
pub(in crate::plugins) fn open_cache(dir: &Path) -> Result<Cache, String> {
    let mut config = CacheConfig::new();
    config.with_directory(dir).with_files_total_size_soft_limit(MAX_CACHE_BYTES);
    Cache::new(config).map_err(|error| format!("{error:#}"))
}

/// The wasmtime engine, and everything else that all plugins share.
#[expect(missing_debug_implementations, reason = "wasmtime's linker has none")]
pub struct Engine {
    pub(in crate::plugins) wasmtime: wasmtime::Engine,
    pub(in crate::plugins) linker: Linker<Guest>,
    /// The directory that holds the cache of compiled code.
    pub(in crate::plugins) state: Option<StateDir>,
    /// Permits to compile, `max_compilers` of them. A large file needs all.
    pub(in crate::plugins) compile_permits: Semaphore,
    /// How many files may be compiled at the same time: one for each core, at most 8.
    pub(in crate::plugins) max_compilers: u32,
    pub(in crate::plugins) metering: Metering,
    ticker: Arc<Ticker>,
    /// The runtime in which guests run, so that a guest that computes for long never delays the daemon's own tasks.
    /// `None` only while the engine is dropped.
    guest_runtime: Option<Runtime>,
}

impl Engine {
    /// Makes an engine, and starts its threads. `state` holds the cache of compiled code; without it, each file is
    /// compiled in this process, without limits.
    ///
    /// # Errors
    ///
    /// When wasmtime cannot be set up on this machine, or a thread cannot be started.
    pub fn new(state: Option<&StateDir>, metering: Metering) -> Result<Arc<Self>, EngineError> {
        // If the cache's directory cannot be created, the state directory has logged that already, and no code is
        // cached.
        let cache = state.and_then(|state| open_cache(&state.cache()).ok());
        let wasmtime = wasmtime_engine(cache, metering).map_err(EngineError::WebAssembly)?;
        let linker = link(&wasmtime).map_err(|error| EngineError::WebAssembly(format!("{error:#}")))?;

        let ticker = Arc::new(Ticker { running_guests: AtomicUsize::new(0), thread: std::sync::OnceLock::new() });
        let (weak, engine) = (Arc::downgrade(&ticker), wasmtime.weak());
        let thread =
            std::thread::Builder::new().name("plugin-ticker".into()).spawn(move || run_ticker(&weak, &engine))?;
        ticker.thread.set(thread.thread().clone()).expect("it is set only here");

        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let max_compilers = u32::try_from(cores).unwrap_or(u32::MAX).min(8);
        let guest_runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads((cores / 2).clamp(1, 4))
            .thread_name("plugin")
            .enable_time()
            .build()?;
        Ok(Arc::new(Self {
            wasmtime,
            linker,
            state: state.cloned(),
            compile_permits: Semaphore::new(max_compilers as usize),
            max_compilers,
            metering,
            ticker,
            guest_runtime: Some(guest_runtime),
        }))
    }

    /// The runtime in which guests run.
    pub(in crate::plugins) fn guest_runtime(&self) -> &Handle {
        self.guest_runtime.as_ref().expect("taken only by drop").handle()
    }

    /// Measures the CPU time of guests as long as the returned guard exists.
    pub(in crate::plugins) fn keep_ticking(&self) -> TickerGuard {
        if self.ticker.running_guests.fetch_add(1, Ordering::AcqRel) == 0
            && let Some(thread) = self.ticker.thread.get()
        {
            thread.unpark();
        }
        TickerGuard(Arc::clone(&self.ticker))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Dropping a tokio runtime blocks, which panics inside another tokio runtime. `shutdown_background` does not
        // block.
        if let Some(runtime) = self.guest_runtime.take() {
            runtime.shutdown_background();
        }
        if let Some(thread) = self.ticker.thread.get() {
            thread.unpark();
        }
    }
}

/// The state of the thread that advances the engine's epoch. The thread sleeps soon after the last guest has ended, so an
/// idle daemon uses no CPU.
struct Ticker {
    running_guests: AtomicUsize,
    thread: std::sync::OnceLock<std::thread::Thread>,
}

/// The ticker's thread advances the epoch as long as such a guard exists.
pub(in crate::plugins) struct TickerGuard(Arc<Ticker>);

impl Drop for TickerGuard {
    fn drop(&mut self) {
        self.0.running_guests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The work of the ticker's thread. It is a thread rather than a task, because a guest that blocks the runtime's
/// threads would block the task that is to interrupt it.
fn run_ticker(ticker: &Weak<Ticker>, engine: &EngineWeak) {
    let mut idle_ticks = 0;
    while let (Some(ticker), Some(engine)) = (ticker.upgrade(), engine.upgrade()) {
        idle_ticks = if ticker.running_guests.load(Ordering::Acquire) == 0 { idle_ticks + 1 } else { 0 };
        engine.increment_epoch();
        drop((ticker, engine));
        if idle_ticks > IDLE_TICKS {
            std::thread::park();
            idle_ticks = 0;
        } else {
            std::thread::sleep(TICK);
        }
    }
}

/// Tells wasmtime which data of a store `wasi:io` uses. The type for this in wasmtime-wasi is not public.
struct HasIo;

impl HasData for HasIo {
    type Data<'a> = &'a mut ResourceTable;
}

/// Tells wasmtime which data of a store the interfaces of `tidings:plugin` use.
pub(in crate::plugins) struct HasGuest;

impl HasData for HasGuest {
    type Data<'a> = &'a mut Guest;
}

/// Links the interfaces of [`LINKED_INTERFACES`].
fn link(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<Guest>> {
    use wasmtime_wasi::cli::{WasiCli, WasiCliView as _};
    use wasmtime_wasi::clocks::{WasiClocks, WasiClocksView as _};
    use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView as _};
    use wasmtime_wasi::p2::bindings::{cli, clocks, filesystem, random};
    use wasmtime_wasi::random::WasiRandom;
    use wasmtime_wasi_io::bindings::wasi::io;

    let mut linker = Linker::<Guest>::new(engine);
    let l = &mut linker;
    bindings::tidings::plugin::types::add_to_linker::<Guest, HasGuest>(l, |guest| guest)?;
    bindings::tidings::plugin::host::add_to_linker::<Guest, HasGuest>(l, |guest| guest)?;
    cli::environment::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::exit::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::stdin::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::stdout::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::stderr::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::terminal_input::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::terminal_output::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::terminal_stdin::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::terminal_stdout::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    cli::terminal_stderr::add_to_linker::<Guest, WasiCli>(l, Guest::cli)?;
    clocks::monotonic_clock::add_to_linker::<Guest, WasiClocks>(l, Guest::clocks)?;
    clocks::wall_clock::add_to_linker::<Guest, WasiClocks>(l, Guest::clocks)?;
    filesystem::preopens::add_to_linker::<Guest, WasiFilesystem>(l, Guest::filesystem)?;
    filesystem::types::add_to_linker::<Guest, WasiFilesystem>(l, Guest::filesystem)?;
    io::error::add_to_linker::<Guest, HasIo>(l, |guest| guest.ctx().table)?;
    io::poll::add_to_linker::<Guest, HasIo>(l, |guest| guest.ctx().table)?;
    io::streams::add_to_linker::<Guest, HasIo>(l, |guest| guest.ctx().table)?;
    random::insecure::add_to_linker::<Guest, WasiRandom>(l, |guest| guest.ctx().ctx.random())?;
    random::insecure_seed::add_to_linker::<Guest, WasiRandom>(l, |guest| guest.ctx().ctx.random())?;
    random::random::add_to_linker::<Guest, WasiRandom>(l, |guest| guest.ctx().ctx.random())?;
    Ok(linker)
}
