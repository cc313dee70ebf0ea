//! What the process tells of itself: the log on standard error, with levels by `RUST_LOG`, the metrics, for Prometheus, and
//! traces, if somebody collects them. Every metric and every attribute has its name here and nowhere else.

mod log;
mod metrics;
mod traces;

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use log::json::Json;
use log::rate_limit::Bounded;
use log::stderr::Stderr;

pub use metrics::counts::{
    Expired, Reload, Server, count_claim, count_dropped_line, count_dropped_spans, count_expired, count_lost_canary,
    count_reload, count_replays, count_wakes, look_at_process, note_next_due, record_canary, record_confirms,
    set_backlog, set_blocked, set_connected, set_letters, set_listening, set_oldest_dead_letter,
};
pub use metrics::kinds::{Batch, CallResult, Calls, count_held, serve};
pub use metrics::last_hour::{LastHour, Minute, last_hour};
pub use metrics::serving::{Serving, set_serving};
pub use metrics::{start_metrics, upkeep};
pub use traces::{Replays, Spans, TraceSettings, Traces, check_endpoint};

/// Without `RUST_LOG`. The clients log the errors that they return as well, and we log those once; wasmtime's cache, that it
/// could not write.
const DEFAULT: &str = "info,lapin=off,sqlx=off,wasmtime_internal_cache=off";

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts the log.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Stderr);
    match format {
        LogFormat::Text => log
            .with_ansi(std::io::stderr().is_terminal())
            .map_event_format(|text| {
                Bounded::new(text, |left_out| format!("    and {left_out} lines like this one were left out before it"))
            })
            .init(),
        LogFormat::Json => log.event_format(Bounded::new(Json, log::json::left_out)).init(),
    }
}
