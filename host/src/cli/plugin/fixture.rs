//! Rows and their outcomes as JSON. Fixtures are written in this form, and `tidings plugin replay` compares two
//! versions of a plugin in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use similar::{ChangeTag, TextDiff};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::model::event::{BuildError, BuiltEvent, Event};
use crate::model::schedule::Schedule;

/// The time of a fixture without `now-ms`: 2026-01-01 00:00 UTC.
const NOW_MS: i64 = 1_767_225_600_000;

/// One file of `fixtures/`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fixture {
    /// The text of the row as its author wrote it: an update keeps it.
    row: Box<RawValue>,
    /// The expected outcome; absent until `--update` has written it.
    pub(super) expect: Option<Value>,
}

/// A row, with the field names of wit/plugin.wit. Only the kind must be given.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Row {
    #[serde(default)]
    id: Uuid,
    kind: String,
    key: Option<String>,
    subject: Option<String>,
    due_ms: Option<i64>,
    now_ms: Option<i64>,
    expires_ms: Option<i64>,
    #[serde(default = "first_attempt")]
    attempt: u32,
    // Not an `Option`, which would turn the payload null into `None`.
    #[serde(default = "empty_object")]
    payload: Box<RawValue>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

fn empty_object() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).expect("it is JSON")
}

fn first_attempt() -> u32 {
    1
}

impl Fixture {
    /// Reads the text of a file.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(serde_json::from_str(text)?)
    }

    /// The row, and the time in Unix milliseconds at which it is built.
    pub(super) fn schedule(&self) -> anyhow::Result<(Schedule, i64)> {
        let row: Row = serde_json::from_str(self.row.get()).context("in row")?;
        let now_ms = row.now_ms.unwrap_or(NOW_MS);
        let schedule = Schedule {
            id: row.id,
            kind: row.kind,
            key: row.key,
            subject: row.subject,
            due_at: instant(row.due_ms.unwrap_or(now_ms)),
            expires_at: row.expires_ms.map(instant),
            payload: row.payload.get().to_owned(),
            headers: row.headers.into_iter().collect(),
            attempts: row.attempt.saturating_sub(1),
            failures: 0,
            refusals: 0,
            untried_since: None,
            recurrence: None,
            nominal_at: None,
            line: None,
            priority: 4,
        };
        Ok((schedule, now_ms))
    }

    /// Writes the text of the file with `expect` as the expected outcome.
    pub(super) fn to_text(&self, expect: &Value) -> String {
        let indented = pretty(expect).replace('\n', "\n  ");
        format!("{{\n  \"row\": {},\n  \"expect\": {indented}\n}}\n", self.row.get())
    }
}

fn instant(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
}

/// Writes the outcome of a row that was built at `now_ms` in the form of a fixture.
pub(super) fn outcome_to_json(outcome: &Result<BuiltEvent, BuildError>, now_ms: i64) -> Value {
    match outcome {
        Ok(built) => {
            let mut value = json!({ "event": event_to_json(&built.event) });
            if let Some(expires_ms) = built.expires_ms {
                value["ttl-ms"] = json!(expires_ms - now_ms);
            }
            value
        }
        Err(BuildError::Invalid(reason)) => json!({ "invalid": reason }),
        Err(BuildError::Skip(reason)) => json!({ "skip": reason }),
        Err(BuildError::Retry(reason, None)) => json!({ "retry": { "reason": reason } }),
        Err(BuildError::Retry(reason, Some(after_ms))) => {
            json!({ "retry": { "reason": reason, "after-ms": after_ms } })
        }
        Err(BuildError::Failed(reason) | BuildError::TooLarge(reason) | BuildError::Unavailable(reason, _)) => {
            json!({ "failed": reason })
        }
    }
}

/// Writes an event. A body that is JSON, but not a JSON string, is shown as JSON, other text as text, and bytes that
/// are not UTF-8 in hexadecimal.
fn event_to_json(event: &Event) -> Value {
    let body = match std::str::from_utf8(event.body()) {
        Ok(text) => match serde_json::from_str(text) {
            Ok(Value::String(_)) | Err(_) => json!(text),
            Ok(value) => value,
        },
        Err(_) => json!({ "hex": crate::model::event::hex(event.body()) }),
    };
    let headers: BTreeMap<&str, &str> =
        event.headers().iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    json!({
        "routing-key": event.routing_key(),
        "content-type": event.content_type(),
        "body": body,
        "headers": headers,
    })
}

/// Whether the actual outcome of a row is the expected one. For a failure, a part of its message is enough: the whole
/// message contains the digest of the file.
pub(super) fn is_expected(actual: &Value, expect: &Value) -> bool {
    match (&actual["failed"], &expect["failed"]) {
        (Value::String(message), Value::String(part)) => message.contains(part),
        _ => *actual == normalize(expect),
    }
}

/// Rewrites an expected outcome so that outcomes which the daemon treats alike are equal: `other` becomes `invalid`,
/// absent headers become empty ones, and a `ttl-ms` of null is removed.
pub(super) fn normalize(expect: &Value) -> Value {
    let mut expect = expect.clone();
    if let Some(object) = expect.as_object_mut() {
        if let Some(reason) = object.remove("other") {
            object.insert("invalid".into(), reason);
        }
        if let Some(event) = object.get_mut("event").and_then(Value::as_object_mut) {
            event.entry("headers").or_insert_with(|| json!({}));
        }
        if object.get("ttl-ms").is_some_and(Value::is_null) {
            object.remove("ttl-ms");
        }
    }
    expect
}

/// Compares two values line by line: a line that is only in `old` begins with -, one that is only in `new` with +.
pub(super) fn diff(old: &Value, new: &Value) -> String {
    let (old, new) = (pretty(old), pretty(new));
    let lines = TextDiff::from_lines(&old, &new);
    let mut text = String::new();
    for group in lines.grouped_ops(2) {
        for change in group.iter().flat_map(|op| lines.iter_changes(op)) {
            let sign = match change.tag() {
                ChangeTag::Delete => '-',
                ChangeTag::Insert => '+',
                ChangeTag::Equal => ' ',
            };
            writeln!(text, "    {sign} {}", change.value().trim_end()).expect("a String takes everything");
        }
    }
    text
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("a Value can always be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_a_fixture_leaves_out_have_defaults_and_misspelt_ones_are_errors() {
        let fixture = Fixture::parse(r#"{"row": {"kind": "a", "payload": {"b": 1.10}, "attempt": 3}}"#).expect("one");
        let (schedule, now_ms) = fixture.schedule().expect("a row");
        assert_eq!((schedule.kind.as_str(), schedule.payload.as_str()), ("a", r#"{"b": 1.10}"#));
        assert_eq!((schedule.attempt(), schedule.due_ms(), now_ms), (3, NOW_MS, NOW_MS));
        let misspelt = Fixture::parse(r#"{"row": {"kind": "a", "paylod": 1}}"#).expect("one");
        assert!(format!("{:#}", misspelt.schedule().expect_err("misspelt")).contains("paylod"));
    }

    #[test]
    fn an_update_keeps_the_row_as_it_was_written() {
        let fixture = Fixture::parse(r#"{"row": {"kind":   "a"}, "expect": {"skip": "old"}}"#).expect("one");
        let text = fixture.to_text(&json!({ "skip": "new" }));
        assert_eq!(text, "{\n  \"row\": {\"kind\":   \"a\"},\n  \"expect\": {\n    \"skip\": \"new\"\n  }\n}\n");
        assert_eq!(Fixture::parse(&text).expect("one").expect, Some(json!({ "skip": "new" })));
    }

    #[test]
    fn a_failure_matches_a_part_of_its_message_and_other_is_the_same_as_invalid() {
        let failed = json!({ "failed": "plugin a@1+01234567: it trapped (unreachable)" });
        assert!(is_expected(&failed, &json!({ "failed": "it trapped" })));
        assert!(
            !is_expected(&failed, &json!({ "failed": "cpu-ms" }))
                && !is_expected(&failed, &json!({ "skip": "it trapped" }))
        );
        assert!(is_expected(&json!({ "invalid": "why" }), &json!({ "other": "why" })));
    }

    #[test]
    fn a_diff_shows_the_lines_that_differ() {
        let difference = diff(&json!({ "skip": "a", "x": 1 }), &json!({ "skip": "b", "x": 1 }));
        assert_eq!(
            difference,
            "      {\n    -   \"skip\": \"a\",\n    +   \"skip\": \"b\",\n        \"x\": 1\n      }\n"
        );
    }
}
