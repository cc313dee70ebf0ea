//! An instance of a plugin in its own store. All calls into a plugin are made here, under the limits, and their
//! failures become sentences for the plugin's author.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use tokio::time::timeout;
use wasmtime::{Store, Trap, WasmBacktrace};

use crate::plugins::runtime::bindings::{Plugin as Bindings, PluginPre};
use crate::plugins::runtime::engine::{Engine, Metering};
use crate::plugins::runtime::host::Guest;
use crate::plugins::runtime::limits::{Limits, TICK};

/// An instance serves the rows of one batch after the other until it was called this often: as often as for the largest batch.
const MAX_CALLS: u32 = 500;
/// Or until its memory has grown by this much: it is kept between two batches.
const MAX_GROWTH_BYTES: usize = 1 << 20;
/// How many functions are named when a plugin traps.
const MAX_FRAMES_NAMED: usize = 3;
/// Parts of the names of functions that handle a panic. They are on top of the stack of every panic, and say nothing
/// about its place.
const PANIC_MACHINERY: [&str; 6] = ["rust_panic", "panicking", "panic_fmt", "begin_panic", "__rust_", "abort"];

/// A plugin in its own store. It can be called until a call fails.
pub(in crate::plugins) struct Instance {
    store: Store<Guest>,
    bindings: Bindings,
    metering: Metering,
    calls: u32,
    /// The memory that it had after its start.
    fresh_memory_bytes: usize,
}

impl Instance {
    /// Starts a plugin in a fresh store. The error is a sentence.
    pub(in crate::plugins) async fn new(
        engine: &Engine,
        pre: &PluginPre<Guest>,
        label: Arc<str>,
        config: Arc<BTreeMap<String, String>>,
        limits: &Limits,
    ) -> Result<Self, String> {
        let mut store = Guest::new_store(&engine.wasmtime, label, config, limits);
        if engine.metering == Metering::Fuel {
            store.set_fuel(u64::MAX).expect("this engine counts fuel");
        }
        match timeout(limits.wall_time(), pre.instantiate_async(&mut store)).await {
            Ok(Ok(bindings)) => {
                let fresh_memory_bytes = store.data().limiter.peak_bytes;
                Ok(Self { store, bindings, metering: engine.metering, calls: 0, fresh_memory_bytes })
            }
            Ok(Err(error)) => Err(format!("while starting, {}", explain_failure(&error, store.data(), limits))),
            Err(_) => Err(format!("while starting, it took longer than {} ms (wall-ms)", limits.wall_ms)),
        }
    }

    /// Makes one call under the limits. After an error the instance must not be used again. Not cancel-safe: an
    /// instance whose call was dropped must not be used again either.
    pub(in crate::plugins) async fn call<T>(
        &mut self,
        limits: &Limits,
        call: impl AsyncFnOnce(&mut Store<Guest>, &Bindings) -> wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        self.calls += 1;
        // Of the tick that is going on, part has passed.
        self.store.set_epoch_deadline(2);
        self.store.set_hostcall_fuel(limits.output_bytes());
        self.store.data_mut().reset_for_call(limits);
        match timeout(limits.wall_time(), call(&mut self.store, &self.bindings)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                let guest = self.store.data();
                let is_too_large = guest.limiter.exceeded.is_some() || is_output_limit(&error);
                Err(CallError { text: explain_failure(&error, guest, limits), is_too_large })
            }
            Err(_) => {
                let text = format!("it took longer than {} ms (wall-ms)", limits.wall_ms);
                Err(CallError { text, is_too_large: false })
            }
        }
    }
}

impl Instance {
    /// Whether no call was made yet.
    pub(in crate::plugins) fn is_fresh(&self) -> bool {
        self.calls == 0
    }

    /// Whether the rows of the next batch should get a fresh instance: this one has served many, or its memory has grown.
    pub(in crate::plugins) fn is_worn(&self) -> bool {
        self.calls >= MAX_CALLS || self.usage().memory_bytes > self.fresh_memory_bytes + MAX_GROWTH_BYTES
    }

    /// What was used so far: memory at its peak, the CPU time of the last call, and the instructions since the start if
    /// they are counted.
    pub(in crate::plugins) fn usage(&self) -> Usage {
        let ticks = self.store.data().cpu_ticks();
        Usage {
            memory_bytes: self.store.data().limiter.peak_bytes,
            cpu_ms: ticks * u64::try_from(TICK.as_millis()).expect("TICK is 10 ms"),
            // If the engine counts no fuel, `get_fuel` would create an error each time, perhaps with a backtrace.
            fuel: (self.metering == Metering::Fuel)
                .then(|| u64::MAX - self.store.get_fuel().expect("this engine counts fuel")),
        }
    }
}

/// What the calls of an instance have used.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::plugins) struct Usage {
    pub(in crate::plugins) memory_bytes: usize,
    pub(in crate::plugins) cpu_ms: u64,
    pub(in crate::plugins) fuel: Option<u64>,
}

/// Why a call failed.
#[derive(Debug)]
pub(in crate::plugins) struct CallError {
    /// A sentence for the plugin's author.
    pub(in crate::plugins) text: String,
    /// Whether the call needed more memory than its limit, or handed more data to the host: the same call would fail in
    /// any fresh store.
    pub(in crate::plugins) is_too_large: bool,
}

/// Whether the call handed too much data to the host. Wasmtime has no public type for this error, so its text is
/// searched.
fn is_output_limit(error: &wasmtime::Error) -> bool {
    error_chain(error).contains("too much data is being copied")
}

/// Why a call failed, as a sentence for the plugin's author.
fn explain_failure(error: &wasmtime::Error, guest: &Guest, limits: &Limits) -> String {
    let mut text = if let Some(exceeded) = &guest.limiter.exceeded {
        exceeded.clone()
    } else if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
        format!("it called exit({})", exit.0)
    } else {
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => format!("it used more than {} ms of CPU time (cpu-ms)", limits.cpu_ms),
            Some(Trap::StackOverflow) => "its stack overflowed (1 MiB), by a recursion perhaps".to_owned(),
            Some(Trap::UnreachableCodeReached) => "it trapped (unreachable), as a panic does".to_owned(),
            Some(trap) => format!("it trapped ({trap})"),
            None if is_output_limit(error) => {
                format!("it handed more than {} KiB to the host in one call (output-kib)", limits.output_kib)
            }
            None => format!("it broke the contract: {}", error_chain(error)),
        }
    };
    let stderr_text = guest.stderr_text();
    if !stderr_text.is_empty() {
        write!(text, "; it wrote: {stderr_text}").expect("writing to a String never fails");
    } else if let Some(functions) = innermost_functions(error) {
        // Without a standard error, only the names of functions say where the plugin trapped.
        write!(text, "; in {functions}").expect("writing to a String never fails");
    }
    text
}

/// The plugin's innermost functions when it trapped, without those that handle the panic; `None` = the file has no
/// names of functions.
fn innermost_functions(error: &wasmtime::Error) -> Option<String> {
    let frames = error.downcast_ref::<WasmBacktrace>()?.frames();
    let names: Vec<&str> = frames
        .iter()
        .filter_map(|frame| frame.func_name())
        .filter(|name| !PANIC_MACHINERY.iter().any(|part| name.contains(part)))
        .take(MAX_FRAMES_NAMED)
        .collect();
    (!names.is_empty()).then(|| names.join(", called by "))
}

/// An error and its causes on one line, without the backtrace.
pub(in crate::plugins) fn error_chain(error: &wasmtime::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .filter(|cause| !cause.starts_with("error while executing"))
        .collect::<Vec<_>>()
        .join(": ")
}
