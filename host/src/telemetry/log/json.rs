//! The log as JSON, one object per line: `timestamp`, `level`, `target`, `message`, and the fields of the line. The
//! JSON formatter of tracing-subscriber is not used because it leaves out the causes of an error.

use std::fmt;

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::model::error_chain::error_chain;

/// Formats a line as JSON.
#[derive(Debug)]
pub(in crate::telemetry) struct Json;

/// The line that says how many lines were left out.
pub(in crate::telemetry) fn left_out(lines: u64) -> String {
    json!({
        "timestamp": timestamp(),
        "level": "WARN",
        "target": module_path!(),
        "message": "before the previous line, lines from the same place in the code were left out",
        "left_out": lines,
    })
    .to_string()
}

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let Fields(mut line) = fields;
        // Last, so that a field with one of these names cannot replace them.
        line.insert("timestamp".into(), timestamp().into());
        line.insert("level".into(), event.metadata().level().as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        writeln!(writer, "{}", Value::from(line))
    }
}

fn timestamp() -> String {
    let mut text = String::new();
    SystemTime.format_time(&mut Writer::new(&mut text)).expect("a String takes everything");
    text
}

/// The fields of one line.
struct Fields(Map<String, Value>);

impl Fields {
    fn insert(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.insert(field, error_chain(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, Write};
    use std::sync::{Arc, Mutex};

    use anyhow::Context as _;

    use super::*;
    use crate::telemetry::log::rate_limit::RateLimited;

    /// The lines that were logged.
    #[derive(Clone, Debug, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("the lock is not poisoned").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_an_object_with_its_fields_and_an_error_with_its_causes() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt()
            .event_format(RateLimited::new(Json, left_out))
            .with_writer(move || writer.clone())
            .finish();

        tracing::subscriber::with_default(log, || {
            let failed: Result<(), _> = Err(Error::other("the disk\nis \"full\""));
            let error = failed.context("could not write").expect_err("it is one");
            tracing::warn!(schedule.id = %uuid::Uuid::nil(), generation = 3_u64, level = "x", error = &*error as &dyn std::error::Error, "a {} line", "bad");
        });

        let written = lines.0.lock().expect("the lock is not poisoned").clone();
        let written = String::from_utf8(written).expect("text");
        assert_eq!(written.lines().count(), 1, "{written}");
        let line: Value = serde_json::from_str(&written).expect("one object");
        assert_eq!(line["message"], "a bad line");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["generation"], 3);
        assert_eq!(line["schedule.id"], uuid::Uuid::nil().to_string());
        assert_eq!(line["error"], "could not write: the disk\nis \"full\"");
        assert!(line["timestamp"].as_str().is_some_and(|at| at.ends_with('Z')), "{line}");
    }

    #[test]
    fn the_line_about_left_out_lines_is_an_object_as_well() {
        let line: Value = serde_json::from_str(&left_out(7)).expect("an object");
        assert_eq!(line["left_out"], 7);
    }
}
