//! Keeps the log readable and the disk free when a million rows fail in the same way: each place in the code may write so
//! many lines in a while, and the next one after that says how many were left out.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Lines from one place in the code within [`WHILE`].
const LINES: u64 = 200;
const WHILE: Duration = Duration::from_secs(10);

/// A format of lines, most of which are written.
#[derive(Debug)]
pub(in crate::telemetry) struct Bounded<F> {
    format: F,
    /// The line that says how many were left out.
    left_out: fn(u64) -> String,
    places: Mutex<HashMap<Identifier, Place>>,
}

impl<F> Bounded<F> {
    pub(in crate::telemetry) fn new(format: F, left_out: fn(u64) -> String) -> Self {
        Self { format, left_out, places: Mutex::default() }
    }
}

/// What one place in the code has written.
#[derive(Clone, Copy, Debug)]
struct Place {
    since: Instant,
    lines: u64,
}

impl Place {
    /// Counts a line. `None` = it is left out; otherwise how many were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let mut left_out = 0;
        if now.duration_since(self.since) >= WHILE {
            left_out = self.lines.saturating_sub(LINES);
            *self = Self { since: now, lines: 0 };
        }
        self.lines += 1;
        (self.lines <= LINES).then_some(left_out)
    }
}

impl<S, N, F> FormatEvent<S, N> for Bounded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let now = Instant::now();
        let admitted = self
            .places
            .lock()
            .expect("nobody panics with it")
            .entry(event.metadata().callsite())
            .or_insert(Place { since: now, lines: 0 })
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
    fn what_is_beyond_the_bound_is_left_out_and_counted_when_the_next_line_comes() {
        let start = Instant::now();
        let mut place = Place { since: start, lines: 0 };
        for _ in 0..LINES {
            assert_eq!(place.admit(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(place.admit(start + WHILE / 2), None);
        }
        assert_eq!(place.admit(start + WHILE), Some(7));
        assert_eq!(place.admit(start + WHILE), Some(0));
        assert_eq!(place.admit(start + 3 * WHILE), Some(0), "nothing was left out");
    }
}
