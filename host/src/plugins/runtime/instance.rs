//! A plugin in its store: every call is made here, under the limits, and told in words when it fails.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use tokio::time::timeout;
use wasmtime::{Store, Trap, WasmBacktrace};

use crate::plugins::runtime::bindings::{Plugin as Bindings, PluginPre};
use crate::plugins::runtime::engine::{Engine, Metering};
use crate::plugins::runtime::host::Guest;
use crate::plugins::runtime::limits::{Limits, TICK};

/// Functions that are named when a plugin traps.
const FRAMES: usize = 3;
/// Parts of the names of functions in which every panic ends.
const PANIC_MACHINERY: [&str; 6] = ["rust_panic", "panicking", "panic_fmt", "begin_panic", "__rust_", "abort"];

/// A plugin in its store, alive until its first failure.
pub(in crate::plugins) struct Instance {
    store: Store<Guest>,
    bindings: Bindings,
    metering: Metering,
    called: bool,
}

impl Instance {
    pub(in crate::plugins) async fn new(
        engine: &Engine,
        pre: &PluginPre<Guest>,
        label: Arc<str>,
        config: Arc<BTreeMap<String, String>>,
        limits: &Limits,
    ) -> Result<Self, String> {
        let mut store = Guest::store(&engine.wasmtime, label, config, limits);
        if engine.metering == Metering::Fuel {
            store.set_fuel(u64::MAX).expect("this engine counts fuel");
        }
        match timeout(limits.wall(), pre.instantiate_async(&mut store)).await {
            Ok(Ok(bindings)) => Ok(Self { store, bindings, metering: engine.metering, called: false }),
            Ok(Err(error)) => Err(format!("while starting, {}", what_happened(&error, store.data(), limits))),
            Err(_) => Err(format!("while starting, it took longer than {} ms (wall-ms)", limits.wall_ms)),
        }
    }

    /// One call under the limits. After an error the instance must not be used again.
    pub(in crate::plugins) async fn call<T>(
        &mut self,
        limits: &Limits,
        call: impl AsyncFnOnce(&mut Store<Guest>, &Bindings) -> wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        self.called = true;
        self.store.set_hostcall_fuel(limits.output_bytes());
        self.store.data_mut().begin_call(limits);
        match timeout(limits.wall(), call(&mut self.store, &self.bindings)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                let guest = self.store.data();
                let too_large = guest.limiter.blown.is_some() || is_output(&error);
                Err(CallError { text: what_happened(&error, guest, limits), too_large })
            }
            Err(_) => {
                let text = format!("it took longer than {} ms (wall-ms)", limits.wall_ms);
                Err(CallError { text, too_large: false })
            }
        }
    }
}

impl Instance {
    /// Whether nothing was asked of it yet.
    pub(in crate::plugins) fn is_fresh(&self) -> bool {
        !self.called
    }

    /// What was used so far: memory at its peak, CPU time of the last call, and fuel since the start if it is counted.
    pub(in crate::plugins) fn used(&self) -> Used {
        let ticks = self.store.data().cpu_ticks();
        Used {
            memory_bytes: self.store.data().limiter.peak,
            cpu_ms: ticks * u64::try_from(TICK.as_millis()).expect("10"),
            // Asked of an engine that counts none, wasmtime would make an error at each call, with a backtrace perhaps.
            fuel: (self.metering == Metering::Fuel)
                .then(|| u64::MAX - self.store.get_fuel().expect("this engine counts fuel")),
        }
    }
}

/// What calls have used.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::plugins) struct Used {
    pub(in crate::plugins) memory_bytes: usize,
    pub(in crate::plugins) cpu_ms: u64,
    pub(in crate::plugins) fuel: Option<u64>,
}

/// Why a call ended in an error.
#[derive(Debug)]
pub(in crate::plugins) struct CallError {
    /// In the words of the plugin's author.
    pub(in crate::plugins) text: String,
    /// It wanted more memory, or handed over more, than it may: in a fresh store the same call would do the same.
    pub(in crate::plugins) too_large: bool,
}

/// Whether it handed too much to the host. Wasmtime has no public type for it.
fn is_output(error: &wasmtime::Error) -> bool {
    chain(error).contains("too much data is being copied")
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
            None if is_output(error) => {
                format!("it handed more than {} KiB to the host in one call (output-kib)", limits.output_kib)
            }
            None => format!("it broke the contract: {}", chain(error)),
        }
    };
    let last_words = guest.last_words();
    if !last_words.is_empty() {
        write!(text, "; it wrote: {last_words}").expect("a String takes everything");
    } else if let Some(place) = place(error) {
        // Toolchains without a standard error leave only the names of functions.
        write!(text, "; in {place}").expect("a String takes everything");
    }
    text
}

/// The innermost functions of the plugin itself when it trapped, as far as their names were left in the file.
fn place(error: &wasmtime::Error) -> Option<String> {
    let frames = error.downcast_ref::<WasmBacktrace>()?.frames();
    let names: Vec<&str> = frames
        .iter()
        .filter_map(|frame| frame.func_name())
        .filter(|name| !PANIC_MACHINERY.iter().any(|part| name.contains(part)))
        .take(FRAMES)
        .collect();
    (!names.is_empty()).then(|| names.join(", called by "))
}

/// An error and its error_chain on one line, without the backtrace.
pub(in crate::plugins) fn chain(error: &wasmtime::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .filter(|cause| !cause.starts_with("error while executing"))
        .collect::<Vec<_>>()
        .join(": ")
}
