//! One wasmtime engine, what is linked to every plugin, the clock that ends their loops, and threads of their own.

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

/// What a plugin's own calls may use of the stack; a deeper recursion traps.
const STACK_BYTES: usize = 1 << 20;

/// The compiled code that is kept; the least used is removed beyond that.
const CACHE_BYTES: u64 = 1 << 30;

/// The interfaces that are linked, without their versions. Those of WASI are there since ordinary toolchains import
/// them; nothing is behind them. Sockets and HTTP are not linked, so that a plugin with them is refused when it is loaded.
pub(in crate::plugins) const OFFERED: [(&str, &str); 22] = [
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
    /// Wasmtime does not support this machine.
    #[error("could not set up WebAssembly: {0}")]
    WebAssembly(String),
    /// There are no threads for them.
    #[error("could not start a thread for plugins")]
    Threads(#[from] std::io::Error),
}

/// How the work of plugins is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metering {
    /// By time, which costs next to nothing.
    Time,
    /// By counting instructions as well: the same on every machine, at half the speed. For `tidings plugin test`.
    Fuel,
}

impl Metering {
    pub(in crate::plugins) fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Fuel => "fuel",
        }
    }

    pub(in crate::plugins) fn named(name: &str) -> Option<Self> {
        [Self::Time, Self::Fuel].into_iter().find(|metering| metering.name() == name)
    }
}

/// Wasmtime, set up as everywhere here: compiled code is found again only under the same configuration.
pub(in crate::plugins) fn wasmtime_engine(
    cache: Option<Cache>,
    metering: Metering,
) -> Result<wasmtime::Engine, String> {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        .epoch_interruption(true)
        .consume_fuel(metering == Metering::Fuel)
        .max_wasm_stack(STACK_BYTES)
        // What the host's functions need on the same stack stays free.
        .async_stack_size(STACK_BYTES * 4)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false);
    config.cache(cache);
    wasmtime::Engine::new(&config).map_err(|error| format!("{error:#}"))
}

/// Where compiled code is kept.
pub(in crate::plugins) fn open_cache(dir: &Path) -> Result<Cache, String> {
    let mut config = CacheConfig::new();
    config.with_directory(dir).with_files_total_size_soft_limit(CACHE_BYTES);
    Cache::new(config).map_err(|error| format!("{error:#}"))
}

/// What all plugins share.
#[expect(missing_debug_implementations, reason = "wasmtime's linker has none")]
pub struct Engine {
    pub(in crate::plugins) wasmtime: wasmtime::Engine,
    pub(in crate::plugins) linker: Linker<Guest>,
    /// Where compiled code is kept.
    pub(in crate::plugins) state: Option<StateDir>,
    /// Who compiles takes his turn here; and how many turns there are.
    pub(in crate::plugins) compilers: (Semaphore, u32),
    pub(in crate::plugins) metering: Metering,
    ticker: Arc<Ticker>,
    /// Guests run here: one that computes for long never delays the daemon's own tasks. `None` only while dropping.
    guests: Option<Runtime>,
}

impl Engine {
    /// Sets everything up. `state` is where compiled code is kept; without it every file is compiled in this process, without
    /// limits.
    ///
    /// # Errors
    ///
    /// When this machine cannot run WebAssembly, or has no threads left.
    pub fn new(state: Option<&StateDir>, metering: Metering) -> Result<Arc<Self>, EngineError> {
        // If its directory cannot be made, the state directory has said so, and the code is kept nowhere.
        let cache = state.and_then(|state| open_cache(&state.cache()).ok());
        let wasmtime = wasmtime_engine(cache, metering).map_err(EngineError::WebAssembly)?;
        let linker = link(&wasmtime).map_err(|error| EngineError::WebAssembly(format!("{error:#}")))?;

        let ticker = Arc::new(Ticker { active: AtomicUsize::new(0), thread: std::sync::OnceLock::new() });
        let (weak, engine) = (Arc::downgrade(&ticker), wasmtime.weak());
        let thread = std::thread::Builder::new().name("plugin-ticker".into()).spawn(move || tick(&weak, &engine))?;
        ticker.thread.set(thread.thread().clone()).expect("set once, here");

        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let compilers = u32::try_from(cores).unwrap_or(u32::MAX).min(8);
        let guests = tokio::runtime::Builder::new_multi_thread()
            .worker_threads((cores / 2).clamp(1, 4))
            .thread_name("plugin")
            .enable_time()
            .build()?;
        Ok(Arc::new(Self {
            wasmtime,
            linker,
            state: state.cloned(),
            compilers: (Semaphore::new(compilers as usize), compilers),
            metering,
            ticker,
            guests: Some(guests),
        }))
    }

    /// Where guests run.
    pub(in crate::plugins) fn guests(&self) -> &Handle {
        self.guests.as_ref().expect("taken only by drop").handle()
    }

    /// While the answer lives, the CPU time of guests is measured.
    pub(in crate::plugins) fn measure(&self) -> Measuring {
        if self.ticker.active.fetch_add(1, Ordering::AcqRel) == 0
            && let Some(thread) = self.ticker.thread.get()
        {
            thread.unpark();
        }
        Measuring(Arc::clone(&self.ticker))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The ordinary drop of a runtime blocks, which must not happen inside another one.
        if let Some(guests) = self.guests.take() {
            guests.shutdown_background();
        }
        if let Some(thread) = self.ticker.thread.get() {
            thread.unpark();
        }
    }
}

/// Advances the engine's epoch while guests run, and sleeps otherwise: an idle daemon burns nothing.
struct Ticker {
    active: AtomicUsize,
    thread: std::sync::OnceLock<std::thread::Thread>,
}

/// Guests are running.
pub(in crate::plugins) struct Measuring(Arc<Ticker>);

impl Drop for Measuring {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The thread of the ticker: not a task, since a runtime that is stuck must not stop the clock that would free it.
fn tick(ticker: &Weak<Ticker>, engine: &EngineWeak) {
    while let (Some(ticker), Some(engine)) = (ticker.upgrade(), engine.upgrade()) {
        let idle = ticker.active.load(Ordering::Acquire) == 0;
        if !idle {
            engine.increment_epoch();
        }
        drop((ticker, engine));
        if idle {
            std::thread::park();
        } else {
            std::thread::sleep(TICK);
        }
    }
}

/// Names the data behind `wasi:io`, for which wasmtime-wasi has a name of its own but does not export it.
struct HasIo;

impl HasData for HasIo {
    type Data<'a> = &'a mut ResourceTable;
}

/// Names the data behind our own interface.
pub(in crate::plugins) struct HasGuest;

impl HasData for HasGuest {
    type Data<'a> = &'a mut Guest;
}

/// Links what [`OFFERED`] lists.
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
