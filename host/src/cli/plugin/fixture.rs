//! Rows and what becomes of them, as JSON: what fixtures are written in, and what two versions are compared in.

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

/// The time of a row that says none: 2026-01-01 00:00 UTC.
const NOW_MS: i64 = 1_767_225_600_000;

/// One file of fixtures/.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fixture {
    /// As it was written, so that it can be written again.
    row: Box<RawValue>,
    /// What must become of it; absent until `--update` has written it.
    pub(super) expect: Option<Value>,
}

/// A row, in the words of wit/plugin.wit. Only the kind must be given.
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
    #[serde(default = "one")]
    attempt: u32,
    // Not an option, for which null would be none.
    #[serde(default = "empty")]
    payload: Box<RawValue>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).expect("it is JSON")
}

fn one() -> u32 {
    1
}

impl Fixture {
    /// Understands the text of a file.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(serde_json::from_str(text)?)
    }

    /// The row, and the time by which it is built.
    pub(super) fn schedule(&self) -> anyhow::Result<(Schedule, i64)> {
        let row: Row = serde_json::from_str(self.row.get()).context("in row")?;
        let now_ms = row.now_ms.unwrap_or(NOW_MS);
        let schedule = Schedule {
            id: row.id,
            kind: row.kind,
            key: row.key,
            subject: row.subject,
            due_at: at(row.due_ms.unwrap_or(now_ms)),
            expires_at: row.expires_ms.map(at),
            payload: row.payload.get().to_owned(),
            headers: row.headers.into_iter().collect(),
            attempts: row.attempt.saturating_sub(1),
            failures: 0,
            refusals: 0,
        };
        Ok((schedule, now_ms))
    }

    /// The text of the file, with `expect` in it.
    pub(super) fn text(&self, expect: &Value) -> String {
        let indented = pretty(expect).replace('\n', "\n  ");
        format!("{{\n  \"row\": {},\n  \"expect\": {indented}\n}}\n", self.row.get())
    }
}

fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
}

/// What became of a row that was built at `now_ms`, as a fixture says it.
pub(super) fn outcome(outcome: &Result<BuiltEvent, BuildError>, now_ms: i64) -> Value {
    match outcome {
        Ok(built) => {
            let mut value = json!({ "event": event(&built.event) });
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

/// An event. A body that is JSON, other than a text, is shown as JSON; other text as it is; anything else in hexadecimal.
fn event(event: &Event) -> Value {
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

/// Whether what became of a row is what is expected. Of a failure a part of its sentence is enough: the rest has the digest
/// of the file in it.
pub(super) fn meets(became: &Value, expect: &Value) -> bool {
    match (&became["failed"], &expect["failed"]) {
        (Value::String(sentence), Value::String(part)) => sentence.contains(part),
        _ => *became == normal(expect),
    }
}

/// What the daemon does the same with is the same: `other` ends like `invalid`, and no headers are headers without any.
pub(super) fn normal(expect: &Value) -> Value {
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

/// Line by line, what is only in `old` (-) and only in `new` (+).
pub(super) fn difference(old: &Value, new: &Value) -> String {
    let (old, new) = (pretty(old), pretty(new));
    let diff = TextDiff::from_lines(&old, &new);
    let mut text = String::new();
    for group in diff.grouped_ops(2) {
        for change in group.iter().flat_map(|op| diff.iter_changes(op)) {
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
    fn a_fixture_says_what_it_wants_and_the_rest_has_defaults() {
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
        let text = fixture.text(&json!({ "skip": "new" }));
        assert_eq!(text, "{\n  \"row\": {\"kind\":   \"a\"},\n  \"expect\": {\n    \"skip\": \"new\"\n  }\n}\n");
        assert_eq!(Fixture::parse(&text).expect("one").expect, Some(json!({ "skip": "new" })));
    }

    #[test]
    fn a_failure_is_met_by_a_part_of_its_sentence_and_other_is_the_same_as_invalid() {
        let failed = json!({ "failed": "plugin a@1+01234567: it trapped (unreachable)" });
        assert!(meets(&failed, &json!({ "failed": "it trapped" })));
        assert!(!meets(&failed, &json!({ "failed": "cpu-ms" })) && !meets(&failed, &json!({ "skip": "it trapped" })));
        assert!(meets(&json!({ "invalid": "why" }), &json!({ "other": "why" })));
    }

    #[test]
    fn only_what_differs_is_shown() {
        let difference = difference(&json!({ "skip": "a", "x": 1 }), &json!({ "skip": "b", "x": 1 }));
        assert_eq!(
            difference,
            "      {\n    -   \"skip\": \"a\",\n    +   \"skip\": \"b\",\n        \"x\": 1\n      }\n"
        );
    }
}
