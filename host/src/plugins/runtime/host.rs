//! The host's side of one store: the functions behind a plugin's imports, which reach almost nothing, and the counters
//! of what its calls have used.

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

/// How many lines one call may log. Further lines are dropped.
const MAX_LOG_LINES: u32 = 100;
/// How many bytes of a line are logged.
const MAX_LOG_LINE_BYTES: usize = 4 * 1024;
/// How many resources a plugin may hold at the same time.
const MAX_HANDLES: usize = 1_000;

/// The data of one store.
pub(in crate::plugins) struct Guest {
    label: Arc<str>,
    config: Arc<BTreeMap<String, String>>,
    pub(in crate::plugins) limiter: Limiter,
    wasi: WasiCtx,
    table: ResourceTable,
    stderr_tail: StderrTail,
    log_lines: u32,
    ticks_used: u64,
    max_ticks: u64,
}

impl Guest {
    /// Makes a fresh store for one plugin. `label` names the plugin in the log.
    pub(in crate::plugins) fn new_store(
        engine: &wasmtime::Engine,
        label: Arc<str>,
        config: Arc<BTreeMap<String, String>>,
        limits: &Limits,
    ) -> Store<Self> {
        let stderr_tail = StderrTail::default();
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_HANDLES);
        let wasi = WasiCtx::builder()
            .stderr(stderr_tail.clone())
            .wall_clock(StoppedClock)
            .monotonic_clock(StoppedClock)
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
            stderr_tail,
            log_lines: 0,
            ticks_used: 0,
            max_ticks: limits.max_cpu_ticks(),
        };
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.limiter);
        store.set_hostcall_fuel(limits.output_bytes());
        store.set_max_component_handles(MAX_HANDLES);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|mut context| {
            let guest = context.data_mut();
            guest.ticks_used += 1;
            Ok(if guest.ticks_used > guest.max_ticks {
                UpdateDeadline::Interrupt
            } else {
                // With wasmtime's plain yield, tokio would run the same task again at once. `yield_now` lets other
                // tasks go first.
                UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))
            })
        });
        store
    }

    /// Resets the counters for the next call.
    pub(in crate::plugins) fn reset_for_call(&mut self, limits: &Limits) {
        self.ticks_used = 0;
        self.max_ticks = limits.max_cpu_ticks();
        self.limiter.set_limits(limits);
        self.log_lines = 0;
        self.stderr_tail.clear();
    }

    /// The end of the text that the plugin wrote to its standard error during this call.
    pub(in crate::plugins) fn stderr_text(&self) -> String {
        self.stderr_tail.text()
    }

    /// CPU time of this call so far, in steps of [`TICK`](crate::plugins::runtime::limits::TICK).
    pub(in crate::plugins) fn cpu_ticks(&self) -> u64 {
        self.ticks_used
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
        if self.log_lines > MAX_LOG_LINES {
            return;
        }
        let text = printable_line(&message);
        // A plugin that was built without a standard error logs the text of its panic. If it traps next, the error
        // shows this text.
        if level == host::Level::Error {
            self.stderr_tail.push_line(&text);
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

/// Cuts `message` to the maximum, and replaces control characters, so that it is one line and cannot change a terminal.
fn printable_line(message: &str) -> String {
    let end = message.floor_char_boundary(message.len().min(MAX_LOG_LINE_BYTES));
    message[..end].chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// A clock that stands still at zero: a plugin's only clock is the row's `now-ms`.
struct StoppedClock;

impl HostWallClock for StoppedClock {
    fn resolution(&self) -> std::time::Duration {
        std::time::Duration::from_secs(1)
    }

    fn now(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

impl HostMonotonicClock for StoppedClock {
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
        assert_eq!(printable_line("a\nb\u{1b}[31mc"), "a b [31mc");
        assert_eq!(printable_line(&"é".repeat(5_000)).len(), MAX_LOG_LINE_BYTES);
    }
}
