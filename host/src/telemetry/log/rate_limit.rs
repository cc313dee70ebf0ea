//! Limits the log when a million rows fail in the same way: each place in the code may write 200 lines in 10 s. The
//! first line after that says how many were left out.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// How many lines one place in the code may write within [`WINDOW`].
const MAX_LINES: u64 = 200;
const WINDOW: Duration = Duration::from_secs(10);

/// A format that leaves out lines beyond the limit.
#[derive(Debug)]
pub(in crate::telemetry) struct RateLimited<F> {
    format: F,
    /// Makes the line that says how many were left out.
    left_out: fn(u64) -> String,
    callsites: Mutex<HashMap<Identifier, LineCount>>,
}

impl<F> RateLimited<F> {
    pub(in crate::telemetry) fn new(format: F, left_out: fn(u64) -> String) -> Self {
        Self { format, left_out, callsites: Mutex::default() }
    }
}

/// How many lines one place in the code has written since the start of its window.
#[derive(Clone, Copy, Debug)]
struct LineCount {
    since: Instant,
    lines: u64,
}

impl LineCount {
    /// Counts a line. Returns `None` if it is to be left out, otherwise how many lines were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let mut left_out = 0;
        if now.duration_since(self.since) >= WINDOW {
            left_out = self.lines.saturating_sub(MAX_LINES);
            *self = Self { since: now, lines: 0 };
        }
        self.lines += 1;
        (self.lines <= MAX_LINES).then_some(left_out)
    }
}

impl<S, N, F> FormatEvent<S, N> for RateLimited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let now = Instant::now();
        let admitted = self
            .callsites
            .lock()
            .expect("the lock is not poisoned")
            .entry(event.metadata().callsite())
            .or_insert(LineCount { since: now, lines: 0 })
            .admit(now);
        let Some(left_out) = admitted else { return Ok(()) };
        self.format.format_event(ctx, writer.by_ref(), event)?;
        if left_out > 0 {
            writeln!(writer, "{}", (self.left_out)(left_out))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_left_out_and_counted_by_the_first_line_of_the_next_window() {
        let start = Instant::now();
        let mut count = LineCount { since: start, lines: 0 };
        for _ in 0..MAX_LINES {
            assert_eq!(count.admit(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(count.admit(start + WINDOW / 2), None);
        }
        assert_eq!(count.admit(start + WINDOW), Some(7));
        assert_eq!(count.admit(start + WINDOW), Some(0));
        assert_eq!(count.admit(start + 3 * WINDOW), Some(0), "nothing was left out");
    }
}
