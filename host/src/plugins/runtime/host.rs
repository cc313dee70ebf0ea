//! The host's side of one store: what a plugin's imports reach, which is next to nothing, and what it has used.

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::Level;
use wasmtime::Store;
use wasmtime::UpdateDeadline;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{Deterministic, HostMonotonicClock, HostWallClock, WasiCtx, WasiCtxView, WasiView};

use crate::plugins::runtime::bindings::tidings::plugin::{host, types};
use crate::plugins::runtime::limits::{Limiter, Limits};
use crate::plugins::runtime::stderr_tail::StderrTail;

/// Lines that one call may log.
const LOG_LINES: u32 = 100;
/// Bytes of one line.
const LOG_LINE_BYTES: usize = 4 * 1024;
/// Resources that a plugin may hold at once.
const HANDLES: usize = 1_000;

/// The data of one store.
pub(in crate::plugins) struct Guest {
    label: Arc<str>,
    config: Arc<BTreeMap<String, String>>,
    pub(in crate::plugins) limiter: Limiter,
    wasi: WasiCtx,
    table: ResourceTable,
    last_words: StderrTail,
    log_lines: u32,
    ticks: u64,
    ticks_allowed: u64,
}

impl Guest {
    /// A fresh store for one plugin. `label` names it in the log.
    pub(in crate::plugins) fn store(
        engine: &wasmtime::Engine,
        label: Arc<str>,
        config: Arc<BTreeMap<String, String>>,
        limits: &Limits,
    ) -> Store<Self> {
        let last_words = StderrTail::default();
        let mut table = ResourceTable::new();
        table.set_max_capacity(HANDLES);
        let wasi = WasiCtx::builder()
            .stderr(last_words.clone())
            .wall_clock(NoClock)
            .monotonic_clock(NoClock)
            .secure_random(Deterministic::new(vec![0]))
            .insecure_random(Deterministic::new(vec![0]))
            .insecure_random_seed(0)
            .max_random_size(64 * 1024)
            .build();
        let guest = Self {
            label,
            config,
            limiter: Limiter::new(limits),
            wasi,
            table,
            last_words,
            log_lines: 0,
            ticks: 0,
            ticks_allowed: limits.ticks(),
        };
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.limiter);
        store.set_hostcall_fuel(limits.output_bytes());
        store.set_max_component_handles(HANDLES);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|mut context| {
            let guest = context.data_mut();
            guest.ticks += 1;
            Ok(if guest.ticks > guest.ticks_allowed {
                UpdateDeadline::Interrupt
            } else {
                // Tokio would run a task that merely yields again at once; this lets the others go first.
                UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))
            })
        });
        store
    }

    /// Starts to count anew, for the next call.
    pub(in crate::plugins) fn begin_call(&mut self, limits: &Limits) {
        self.ticks = 0;
        self.ticks_allowed = limits.ticks();
        self.limiter.set(limits);
        self.log_lines = 0;
        self.last_words.clear();
    }

    /// The end of what the plugin wrote to its standard error during this call.
    pub(in crate::plugins) fn last_words(&self) -> String {
        self.last_words.text()
    }

    /// CPU time of this call so far, in steps of [`TICK`](crate::plugins::runtime::limits::TICK).
    pub(in crate::plugins) fn cpu_ticks(&self) -> u64 {
        self.ticks
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl types::Host for Guest {}

impl host::Host for Guest {
    fn log(&mut self, level: host::Level, message: String) {
        self.log_lines = self.log_lines.saturating_add(1);
        if self.log_lines > LOG_LINES {
            return;
        }
        let text = printable(&message);
        // A plugin without a standard error logs the text of its panic: if it traps next, these are its last words.
        if level == host::Level::Error {
            self.last_words.hear(&text);
        }
        let plugin = &*self.label;
        match level {
            host::Level::Trace => tracing::event!(target: "plugin", Level::TRACE, plugin, "{text}"),
            host::Level::Debug => tracing::event!(target: "plugin", Level::DEBUG, plugin, "{text}"),
            host::Level::Info => tracing::event!(target: "plugin", Level::INFO, plugin, "{text}"),
            host::Level::Warn => tracing::event!(target: "plugin", Level::WARN, plugin, "{text}"),
            host::Level::Error => tracing::event!(target: "plugin", Level::ERROR, plugin, "{text}"),
        }
    }

    fn config(&mut self, key: String) -> Option<String> {
        self.config.get(&key).cloned()
    }
}

/// One line that cannot do anything to a terminal.
fn printable(message: &str) -> String {
    let end = message.floor_char_boundary(message.len().min(LOG_LINE_BYTES));
    message[..end].chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// Stands still at zero: a plugin's only clock is the row's `now-ms`.
struct NoClock;

impl HostWallClock for NoClock {
    fn resolution(&self) -> std::time::Duration {
        std::time::Duration::from_secs(1)
    }

    fn now(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

impl HostMonotonicClock for NoClock {
    fn resolution(&self) -> u64 {
        1_000_000_000
    }

    fn now(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_is_one_short_line_without_control_characters() {
        assert_eq!(printable("a\nb\u{1b}[31mc"), "a b [31mc");
        assert_eq!(printable(&"é".repeat(5_000)).len(), LOG_LINE_BYTES);
    }
}
