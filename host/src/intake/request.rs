//! What a message that was published to an intake asks for: decided from its properties, headers and body alone. The table is in
//! `host/docs/intake.md`. No I/O, no clock.
//!
//! Must never panic or accept what cannot become a row: anyone who may publish can have written the message. What a rule of the
//! schema decides is left to PostgreSQL, which refuses it with a sentence.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{Context, SHA256};
use serde::de::IgnoredAny;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::model::clock::unix_ms;
use crate::model::event::LONGEST_TTL_MS;
use crate::model::intake::{Incoming, Intake, NewRow, OnConflict, Request, Target, When};
use crate::model::properties::{HeaderValue, Headers, headers_to_json};
use crate::model::relay;
use crate::model::relay::{OWN_HEADERS, Relayed};
use crate::model::schedule::{DEFAULT_PRIORITY, HIGHEST_PRIORITY};

/// The header with a delay, as clients of the delayed-message plugin send it.
const DELAY: &str = "x-delay";
/// The longest key and subject, in bytes.
const NAME_BYTES: usize = 255;

/// What an intake takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The longest body, in bytes.
    pub max_body: usize,
    /// The kinds that a message may name; `None` = all.
    pub kinds: Option<BTreeSet<String>>,
}

/// Reads what a message asks for. `now_ms` is the time by the database's clock, or nearly.
///
/// # Errors
///
/// Why it cannot be: a sentence for the publisher.
pub fn read(message: &Incoming, intake: &Intake, queue: &str, rules: &Rules, now_ms: i64) -> Result<Request, String> {
    if message.is_unreadable {
        return Err("its headers cannot be read; the header tidings-unreadable has them as they came".into());
    }
    if message.body.len() > rules.max_body {
        return Err(format!(
            "its body has {} bytes, more than TIDINGS_INTAKE_MAX_BODY allows ({})",
            message.body.len(),
            rules.max_body
        ));
    }
    let kind = text(message, "tidings-kind")?.unwrap_or(relay::KIND).to_owned();
    check_kind(&kind, rules)?;
    let (key, subject) = (name(message, "tidings-key")?, name(message, "tidings-subject")?);
    let due = due(message, now_ms)?;
    match text(message, "tidings-action")? {
        None | Some("schedule") => {}
        Some("cancel") => return Ok(Request::Cancel(target(kind, key, subject)?)),
        Some("reschedule") => return Ok(Request::Reschedule(target(kind, key, subject)?, due)),
        Some(other) => return Err(format!("tidings-action is {other:?}, not schedule, cancel or reschedule")),
    }
    let on_conflict = match text(message, "tidings-on-conflict")? {
        None => None,
        Some("replace") => Some(OnConflict::Replace),
        Some("keep") => Some(OnConflict::Keep),
        Some("error") => Some(OnConflict::Error),
        Some(other) => return Err(format!("tidings-on-conflict is {other:?}, not replace, keep or error")),
    };
    let message_id = message.properties.message_id.clone().filter(|id| !id.is_empty());
    let (key, on_conflict) = match (key, &message_id) {
        (Some(key), _) => (Some(key), on_conflict.unwrap_or(OnConflict::Replace)),
        // A name that PostgreSQL cannot store is no key, and the message has one id all the same.
        (None, Some(id)) if !id.contains('\0') => (Some(id.clone()), on_conflict.unwrap_or(OnConflict::Same)),
        (None, _) => (None, OnConflict::Same),
    };
    let expires_ms = instant(message, "tidings-expires-ms", now_ms)?;
    let expires_after_ms = match &message.expiration {
        None => None,
        // At 0 it would have to be published before it is due.
        Some(text) => {
            Some(text.parse::<i64>().map_err(|_| format!("its expiration is {text:?}, not a number of ms"))?.max(1))
        }
    };
    let id = message_id.map(|id| id_of(queue, &id, message));
    let redelivered = message.redelivered;
    let (payload, headers) = if kind == relay::KIND {
        let relayed = relayed(message, intake);
        relayed.check_length().map_err(|error| format!("its {error}"))?;
        (relayed.to_payload(), "{}".to_owned())
    } else {
        let headers = row_headers(message);
        let body = str::from_utf8(&message.body).map_err(|_| not_json("it is not UTF-8"))?;
        serde_json::from_str::<IgnoredAny>(body).map_err(|error| not_json(&error.to_string()))?;
        (body.to_owned(), serde_json::to_string(&headers).expect("texts can be written as JSON"))
    };
    let row = NewRow {
        id,
        redelivered,
        kind,
        key,
        subject,
        due,
        expires_ms,
        expires_after_ms,
        priority: message.properties.priority.map_or(DEFAULT_PRIORITY, |priority| priority.min(HIGHEST_PRIORITY)),
        payload,
        headers,
        on_conflict,
    };
    Ok(Request::Schedule(Box::new(row)))
}

fn not_json(why: &str) -> String {
    format!("its tidings-kind needs a body that is JSON: {why}")
}

fn check_kind(kind: &str, rules: &Rules) -> Result<(), String> {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let begins = kind.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if !begins || kind.len() > 100 || !kind.bytes().all(is_allowed) {
        return Err(format!("tidings-kind is {kind:?}: kind must match [a-z0-9][a-z0-9._-]{{0,99}}"));
    }
    match &rules.kinds {
        Some(kinds) if kind != relay::KIND && !kinds.contains(kind) => {
            Err(format!("tidings-kind is {kind:?}, which TIDINGS_INTAKE_KINDS does not allow"))
        }
        _ => Ok(()),
    }
}

fn target(kind: String, key: Option<String>, subject: Option<String>) -> Result<Target, String> {
    match (key, subject) {
        (Some(key), _) => Ok(Target::Key { kind, key }),
        (None, Some(subject)) => Ok(Target::Subject(subject)),
        (None, None) => Err("its tidings-action needs tidings-key or tidings-subject".into()),
    }
}

/// The text of a header.
fn text<'a>(message: &'a Incoming, name: &str) -> Result<Option<&'a str>, String> {
    match message.headers.get(name) {
        None | Some(HeaderValue::Void) => Ok(None),
        Some(HeaderValue::Text(text)) => Ok(Some(text)),
        Some(_) => Err(format!("{name} is not a text")),
    }
}

/// The text of a header that becomes a key or a subject.
fn name(message: &Incoming, header: &str) -> Result<Option<String>, String> {
    match text(message, header)? {
        None => Ok(None),
        Some(name) if name.contains('\0') => Err(format!("{header} contains NUL, which PostgreSQL cannot store")),
        Some(name) if !(1..=NAME_BYTES).contains(&name.len()) => {
            Err(format!("{header} has {} bytes, not 1 to {NAME_BYTES}", name.len()))
        }
        Some(name) => Ok(Some(name.to_owned())),
    }
}

/// The whole number in a header: of any integer type, a floating-point number without a fraction, or digits in a text.
fn number(message: &Incoming, name: &str) -> Result<Option<i64>, String> {
    let Some(value) = message.headers.get(name).filter(|value| **value != HeaderValue::Void) else { return Ok(None) };
    let number = match value {
        HeaderValue::Text(text) => text.parse().ok(),
        HeaderValue::F32(number) => whole(f64::from(*number)),
        HeaderValue::F64(number) => whole(*number),
        other => other.as_number(),
    };
    number.map(Some).ok_or_else(|| format!("{name} is not a whole number"))
}

/// A floating-point number as a whole one, if it is one and is exact.
fn whole(number: f64) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "it has no fraction and fits")]
    (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
}

/// An instant in a header, in milliseconds since the Unix epoch.
fn instant(message: &Incoming, name: &str, now_ms: i64) -> Result<Option<i64>, String> {
    number(message, name)?.map(|at| within_ten_years(name, at, now_ms)).transpose()
}

fn within_ten_years(name: &str, at_ms: i64, now_ms: i64) -> Result<i64, String> {
    if at_ms.saturating_sub(now_ms) > LONGEST_TTL_MS.cast_signed() {
        return Err(format!("{name} is more than ten years ahead"));
    }
    Ok(at_ms)
}

fn due(message: &Incoming, now_ms: i64) -> Result<When, String> {
    // First, since a consumer may publish what it got again, with another delay and the old due time in it.
    if let Some(delay_ms) = number(message, DELAY)?.filter(|delay_ms| *delay_ms > 0) {
        if delay_ms > LONGEST_TTL_MS.cast_signed() {
            return Err(format!("{DELAY} is more than ten years"));
        }
        let sent = message.properties.timestamp.and_then(|sent| i64::try_from(sent).ok());
        return Ok(match sent.filter(|_| message.waited) {
            Some(sent) => When::AfterSent { delay_ms, sent: sent.min(now_ms / 1_000) },
            None => When::After(delay_ms),
        });
    }
    if let Some(at_ms) = instant(message, "tidings-due-ms", now_ms)? {
        return Ok(if at_ms > 0 { When::At(at_ms) } else { When::After(0) });
    }
    let Some(at) = text(message, "tidings-due")? else { return Ok(When::After(0)) };
    let at = OffsetDateTime::parse(at, &Rfc3339)
        .map_err(|_| format!("tidings-due is {at:?}, not a time of RFC 3339 such as 2026-12-24T18:00:00Z"))?;
    within_ten_years("tidings-due", unix_ms(at), now_ms).map(When::At)
}

/// The id of the row of a message with this `message_id`. It is the same when RabbitMQ delivers the message again, and another one
/// when a consumer publishes what it got again: by then the headers say something else.
fn id_of(queue: &str, message_id: &str, message: &Incoming) -> Uuid {
    let asked = |name: &str| name == DELAY || name.starts_with(OWN_HEADERS);
    let asks = message.headers.iter().filter(|(name, _)| asked(name));
    let asks: Headers = asks.map(|(name, value)| (name.clone(), value.clone())).collect();
    let asks = serde_json::to_string(&headers_to_json(&asks)).expect("headers can be written as JSON");
    let sent = message.properties.timestamp.unwrap_or(0).to_string();
    let mut hash = Context::new(&SHA256);
    for part in [queue, message_id, &sent, &asks] {
        // With its length, so that different parts never give the same bytes.
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finish();
    let bytes: [u8; 16] = digest.as_ref()[..16].try_into().expect("a SHA-256 has 32 bytes");
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// The message that is published when it is due.
fn relayed(message: &Incoming, intake: &Intake) -> Relayed {
    let Incoming { routing_key, properties, headers, body, .. } = message;
    let own = headers.iter().filter(|(name, _)| !name.starts_with(OWN_HEADERS));
    let mut headers: Headers = own.map(|(name, value)| (name.clone(), value.clone())).collect();
    if let Ok(Some(delay_ms)) = number(message, DELAY) {
        headers.insert(DELAY.to_owned(), negated(delay_ms));
    }
    Relayed {
        exchange: intake.to.clone(),
        routing_key: routing_key.clone(),
        properties: properties.clone(),
        headers,
        body: body.clone(),
    }
}

/// A delay that has passed, as the plugin marks it: negative, and a signed 32-bit number where it fits into one (source:
/// `rabbit_delayed_message_utils:swap_delay_header`).
fn negated(delay_ms: i64) -> HeaderValue {
    let negative = delay_ms.saturating_neg();
    i32::try_from(negative).map_or(HeaderValue::Number(negative), HeaderValue::I32)
}

/// The headers that a row of another kind gets: texts, numbers and booleans, as text, except those that are not a producer's.
fn row_headers(message: &Incoming) -> BTreeMap<&str, String> {
    let allowed = |name: &str| {
        !name.is_empty() && !name.starts_with(OWN_HEADERS) && !name.starts_with("x-") && name != "CC" && name != "BCC"
    };
    let as_text = |value: &HeaderValue| match value {
        HeaderValue::Text(text) => Some(text.clone()),
        HeaderValue::Boolean(value) => Some(value.to_string()),
        other => other.as_number().map(|number| number.to_string()),
    };
    let headers = message.headers.iter().filter(|(name, _)| allowed(name));
    headers.filter_map(|(name, value)| Some((name.as_str(), as_text(value)?))).collect()
}

#[cfg(test)]
mod tests;
