//! The claim together with its BEGIN, and finishing rows together with the COMMIT, each in one message to the server. That
//! saves two round trips for a row that comes alone. sqlx sends several statements in one message only without parameters, so
//! each session prepares both statements by name, and a message has their values as literals.
//!
//! Must never put a value into a message but through the functions here.

use std::fmt::Write as _;

use sqlx::{AssertSqlSafe, PgConnection};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::store::queue::claim::{CLAIM_BYTES, Order, Rows, Wanted};
use crate::store::{Connection, Store, StoreError};

/// What each session prepares before its first look or claim.
const PREPARE: &str = concat!(
    "PREPARE tidings_claim (text[], bigint, bigint, timestamptz, boolean) AS ",
    include_str!("claim/rows.sql"),
    include_str!("claim/due.sql"),
    include_str!("claim/summary.sql"),
    include_str!("claim/due_outlook.sql"),
    ", NULL;PREPARE tidings_claim_by_kind (text[], bigint, bigint, timestamptz, boolean) AS ",
    include_str!("claim/shares.sql"),
    include_str!("claim/rows.sql"),
    include_str!("claim/due_by_kind.sql"),
    include_str!("claim/summary.sql"),
    include_str!("claim/due_outlook.sql"),
    include_str!("claim/shares_wanted.sql"),
    ";PREPARE tidings_claim_bounded (text[], bigint, bigint, timestamptz, boolean) AS ",
    include_str!("claim/rows.sql"),
    include_str!("claim/due_bounded.sql"),
    include_str!("claim/summary.sql"),
    include_str!("claim/due_outlook.sql"),
    ", NULL;PREPARE tidings_lock_lines (text[], bigint) AS ",
    include_str!("claim/lock_lines.sql"),
    ";PREPARE tidings_claim_turns (text[], bigint, bigint, timestamptz, boolean) AS ",
    include_str!("claim/turns.sql"),
    include_str!("claim/rows.sql"),
    include_str!("claim/turn_rows.sql"),
    include_str!("claim/summary.sql"),
    include_str!("claim/turns_outlook.sql"),
    ", NULL;PREPARE tidings_finish (uuid[], text[], timestamptz[], text[], text[], text[], bigint[], text[]) AS ",
    include_str!("finish.sql"),
    ";PREPARE tidings_turn (text[], text[], bigint[], bigint[], timestamptz[]) AS ",
    include_str!("turn.sql"),
);
/// The most lines that one claim takes turns of. Each has a lock in PostgreSQL's table of locks until the claim is settled.
const MAX_LINES: u32 = 50;
/// A time as PostgreSQL reads and writes it, to the microsecond.
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:6]+00");

impl Store {
    /// Borrows a connection for looks and claims, on which their statements are prepared: of those that have them, the one
    /// that was used last.
    pub(in crate::store) async fn warm_connection(&self) -> Result<Connection, StoreError> {
        let mut connection = self.borrow_connection(true).await?;
        if !connection.is_warm() {
            let prepare = async |session: &mut PgConnection| sqlx::raw_sql(PREPARE).execute(session).await;
            connection.run("prepare the statements of claims", prepare).await?;
            connection.set_warm();
        }
        Ok(connection)
    }
}

/// A statement that runs a prepared one.
#[derive(Debug)]
pub(in crate::store) struct Message(String);

impl Message {
    /// Begins a transaction and claims the `wanted` rows. `synchronous_commit` is that of the transaction. If the claim takes turns,
    /// PostgreSQL answers the locking of the lines first, with one row.
    pub(super) fn claim(kinds: &[String], wanted: Wanted, synchronous_commit: bool) -> Self {
        let Wanted { rows, limit, no_large } = wanted;
        let kinds = array(kinds.iter().map(|kind| Some(&**kind)));
        let set = if synchronous_commit { "" } else { "SET LOCAL synchronous_commit TO off; " };
        let (lock, name, since) = match rows {
            Rows::Due { since, order: Order::Slot } => (String::new(), "tidings_claim", since),
            Rows::Due { since, order: Order::BoundedSlot } => (String::new(), "tidings_claim_bounded", since),
            Rows::Due { since, order: Order::Kind } => (String::new(), "tidings_claim_by_kind", since),
            Rows::Turns => (format!("EXECUTE tidings_lock_lines({kinds}, {MAX_LINES}); "), "tidings_claim_turns", None),
        };
        let since = since.map_or("NULL".to_owned(), |since| format!("'{}'", time(since)));
        Self(format!("BEGIN; {set}{lock}EXECUTE {name}({kinds}, {limit}, {CLAIM_BYTES}, {since}, {no_large})"))
    }

    /// Finishes rows, with the literals of the arrays in the order of the statement.
    pub(super) fn finish(arrays: &[String; 8]) -> Self {
        Self(format!("EXECUTE tidings_finish({})", arrays.join(", ")))
    }

    /// Takes turns, with the literals of the arrays in the order of the statement.
    pub(super) fn turn(arrays: &[String; 5]) -> Self {
        Self(format!("EXECUTE tidings_turn({})", arrays.join(", ")))
    }

    /// Runs this message, then `next` if there is one, and commits.
    pub(super) fn and_commit(self, next: Option<Self>) -> Self {
        let next = next.map_or(String::new(), |next| format!("; {}", next.0));
        Self(format!("{}{next}; COMMIT", self.0))
    }

    pub(super) fn into_sql(self) -> AssertSqlSafe<String> {
        AssertSqlSafe(self.0)
    }
}

/// A time, to the microsecond.
pub(super) fn time(at: OffsetDateTime) -> String {
    at.to_offset(time::UtcOffset::UTC).format(TIME).expect("the years 0 to 9999 have four digits")
}

/// The literal of an array.
pub(super) fn array<'a>(values: impl Iterator<Item = Option<&'a str>>) -> String {
    let mut literal = String::from("E'{");
    for (index, value) in values.enumerate() {
        if index > 0 {
            literal.push(',');
        }
        let Some(value) = value else {
            literal.push_str("NULL");
            continue;
        };
        literal.push('"');
        for char in value.chars() {
            match char {
                // Once for the array and once for the literal.
                '"' => literal.push_str("\\\\\""),
                '\\' => literal.push_str("\\\\\\\\"),
                '\'' => literal.push_str("''"),
                char => literal.push(char),
            }
        }
        literal.push('"');
    }
    literal.push_str("}'");
    literal
}

/// The literal of an array of numbers.
pub(super) fn numbers(values: impl Iterator<Item = Option<i64>>) -> String {
    let mut literal = String::from("'{");
    for (index, value) in values.enumerate() {
        let comma = if index > 0 { "," } else { "" };
        match value {
            Some(value) => write!(literal, "{comma}{value}"),
            None => write!(literal, "{comma}NULL"),
        }
        .expect("writing to a String never fails");
    }
    literal.push_str("}'");
    literal
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The values in the literal of an array, as PostgreSQL reads it: first the literal, then the array.
    fn read(literal: &str) -> Vec<Option<String>> {
        let inner = literal.strip_prefix("E'").and_then(|literal| literal.strip_suffix('\'')).expect("a literal");
        let (mut array, mut chars) = (String::new(), inner.chars());
        while let Some(char) = chars.next() {
            match char {
                '\\' | '\'' => array.push(chars.next().expect("an escape is never the last")),
                char => array.push(char),
            }
            assert!(char != '\'' || array.ends_with('\''), "a quote that is not doubled ends the literal");
        }
        let mut rest = array.strip_prefix('{').and_then(|array| array.strip_suffix('}')).expect("an array");
        let mut values = Vec::new();
        while !rest.is_empty() {
            rest = rest.strip_prefix(',').unwrap_or(rest);
            if let Some(after) = rest.strip_prefix("NULL") {
                rest = after;
                values.push(None);
                continue;
            }
            let (mut value, mut chars) = (String::new(), rest.strip_prefix('"').expect("a quoted value").chars());
            while let Some(char) = chars.next().filter(|char| *char != '"') {
                value.push(if char == '\\' { chars.next().expect("an escape is never the last") } else { char });
            }
            rest = chars.as_str();
            values.push(Some(value));
        }
        values
    }

    proptest! {
        #[test]
        fn any_texts_are_read_as_they_were_written(
            values in prop::collection::vec(prop::option::of("[\\\\\"'{},NUL\\PC]{0,20}"), 0..6),
        ) {
            prop_assert_eq!(read(&array(values.iter().map(Option::as_deref))), values);
        }
    }

    #[test]
    fn literals_are_as_postgresql_writes_them() {
        assert_eq!(array([Some("a"), None, Some(r#"'"\"#)].into_iter()), r#"E'{"a",NULL,"''\\"\\\\"}'"#);
        assert_eq!(array(std::iter::empty()), "E'{}'");
        assert_eq!(numbers([Some(-1), None].into_iter()), "'{-1,NULL}'");
        let at = OffsetDateTime::UNIX_EPOCH + std::time::Duration::from_millis(1_500);
        assert_eq!(time(at), "1970-01-01 00:00:01.500000+00");
    }
}
