//! What the process reports about itself: the log on standard error, with the levels of `RUST_LOG`; metrics for
//! Prometheus; and traces, if a collector is set.
//!
//! Must never be waited for: a line of the log or a span that nothing takes is dropped and counted. Must never have
//! labels that users can make up without end.
//!
//! To change it, know: every metric and every attribute of a span has its name here and nowhere else. Alerts,
//! dashboards and docs/operations.md use the names; tests compare them.

mod log;
mod metrics;
mod traces;

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use log::json::Json;
use log::rate_limit::RateLimited;
use log::stderr::Stderr;

pub use metrics::counts::{
    Expired, Reload, Server, count_claim, count_clock_step, count_dropped_line, count_dropped_spans, count_expired,
    count_intake, count_lost_canary, count_occurrences, count_refused_by_intake, count_reload, count_replays,
    count_wakes, look_at_process, note_next_due, record_canary, record_confirms, record_making_lag, serve_intake,
    set_backlog, set_blocked, set_connected, set_intake_waiting, set_letters, set_listening, set_oldest_dead_letter,
    set_recurrences,
};
pub use metrics::kinds::{Batch, CallResult, Calls, count_held, serve, set_limits};
pub use metrics::last_hour::{LastHour, Minute, last_hour};
pub use metrics::serving::{Serving, set_serving};
pub use metrics::{start_metrics, upkeep};
pub use traces::{Replays, Spans, TraceSettings, Traces, check_endpoint};

/// The filter without `RUST_LOG`. lapin and sqlx log the errors that they also return, and the daemon logs those
/// itself. wasmtime's cache logs each failure to write.
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
                RateLimited::new(text, |left_out| {
                    format!("    {left_out} lines from the same place in the code were left out before this one")
                })
            })
            .init(),
        LogFormat::Json => log.event_format(RateLimited::new(Json, log::json::left_out)).init(),
    }
}
