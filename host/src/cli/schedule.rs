//! `tidings schedule` and `tidings cancel`: do what an application does in SQL, with the same SQL functions.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::cli::output::Output;
use crate::cli::{NOT_FOUND, fail_usage, times, with_store};
use crate::config::{DatabaseArgs, ValidationErrors};
use crate::store::{NewSchedule, Store};

/// What to schedule.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings schedule message --in 10min --key greeting --expires-in 1h \\\n      \
                        --payload '{\"routing_key\": \"hello\", \"body\": \"Hello!\"}'")]
pub(super) struct ScheduleArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind, which selects the plugin
    kind: String,
    /// When it is due, in RFC 3339
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant, required_unless_present = "due_in", conflicts_with = "due_in")]
    at: Option<OffsetDateTime>,
    /// How long from now it is due, such as 90s, 15min, 2h or 3days
    #[arg(long = "in", id = "due_in", value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    due_in: Option<Duration>,
    /// Its natural name within the kind: at most one pending row has it
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// What it is about, for `tidings cancel --subject`
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// Its deadline, in RFC 3339: never published after that
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant, conflicts_with = "expires_in")]
    expires_at: Option<OffsetDateTime>,
    /// Its deadline, as a time span from when it is due
    #[arg(long, value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    expires_in: Option<Duration>,
    #[command(flatten)]
    payload: PayloadArgs,
    /// It is due later by a part of this, which follows from its key
    #[arg(long, value_name = "SPAN", default_value = "0s", allow_hyphen_values = true, value_parser = times::parse_span)]
    spread: Duration,
    /// Which of the rows that are due goes first, from 0, the last, to 9; also the priority of the message
    #[arg(long, value_name = "0..9", default_value_t = 4, value_parser = clap::value_parser!(i32).range(0..=9), allow_negative_numbers = true)]
    priority: i32,
    /// What to do if the key is taken: replace that row, keep it (and print its id), or fail
    #[arg(long, value_enum, default_value = "replace")]
    on_conflict: OnConflict,
}

/// What the plugin is given, and the headers of the message.
#[derive(Args, Debug)]
pub(super) struct PayloadArgs {
    /// What the plugin is given: JSON, @FILE with JSON in it, or - for standard input
    #[arg(long, value_name = "JSON|@FILE|-", default_value = "{}")]
    payload: String,
    /// A header of the message; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE")]
    headers: Vec<String>,
}

impl PayloadArgs {
    /// Reads both, as JSON texts. Reports every mistake.
    pub(super) fn read(&self) -> Result<(String, String), ValidationErrors> {
        match (read_payload(&self.payload), parse_headers(&self.headers)) {
            (Ok(payload), Ok(headers)) => Ok((payload, headers)),
            (payload, headers) => Err([payload.err(), headers.err()].into_iter().flatten().collect()),
        }
    }
}

/// What to do if the key or the name is taken.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum OnConflict {
    Replace,
    Keep,
    Error,
}

impl OnConflict {
    /// As the SQL functions take it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Replace => "replace",
            Self::Keep => "keep",
            Self::Error => "error",
        }
    }
}

/// What to cancel.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  tidings cancel game-reminder 'game 7/60'\n  tidings cancel --subject 'game 7'")]
pub(super) struct CancelArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind
    #[arg(required_unless_present = "subject", requires = "key", conflicts_with = "subject")]
    kind: Option<String>,
    /// The key within the kind
    key: Option<String>,
    /// Every pending row about this subject
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
}

/// What `tidings schedule` answers.
#[derive(Debug, Serialize)]
struct Scheduled {
    id: Uuid,
}

/// What `tidings cancel` answers.
#[derive(Debug, Serialize)]
struct Cancelled {
    cancelled: i64,
}

pub(super) async fn schedule(args: ScheduleArgs, output: Output) -> ExitCode {
    let (payload, headers) = match args.payload.read() {
        Ok(read) => read,
        Err(errors) => return fail_usage(&errors),
    };
    let new = NewSchedule {
        kind: args.kind,
        due: match (args.at, args.due_in) {
            (Some(at), _) => Ok(at),
            (None, span) => Err(span.unwrap_or_default()),
        },
        key: args.key,
        subject: args.subject,
        expires: match (args.expires_at, args.expires_in) {
            (None, None) => None,
            (Some(at), _) => Some(Ok(at)),
            (None, Some(span)) => Some(Err(span)),
        },
        payload,
        headers,
        on_conflict: args.on_conflict.word(),
        spread: args.spread,
        priority: args.priority,
    };
    with_store(args.database, async |store: Store| {
        let id = store.schedule(&new).await?;
        output.answer(&Scheduled { id });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

pub(super) async fn cancel(args: CancelArgs, output: Output) -> ExitCode {
    let CancelArgs { database, kind, key, subject } = args;
    with_store(database, async |store: Store| {
        let cancelled = match (kind, key, subject) {
            (_, _, Some(subject)) => store.cancel_subject(&subject).await?,
            (kind, key, None) => i64::from(store.cancel(&kind.unwrap_or_default(), &key.unwrap_or_default()).await?),
        };
        output.answer(&Cancelled { cancelled });
        Ok(if cancelled == 0 { ExitCode::from(NOT_FOUND) } else { ExitCode::SUCCESS })
    })
    .await
}

/// Reads the payload from the argument, from a file or from standard input, and checks that it is JSON.
fn read_payload(given: &str) -> Result<String, String> {
    let text = match given.strip_prefix('@') {
        Some(file) => {
            std::fs::read_to_string(file).map_err(|error| format!("--payload: cannot read {file}: {error}"))?
        }
        None if given == "-" => {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            read.map_err(|error| format!("--payload: cannot read standard input: {error}"))?;
            text
        }
        None => given.to_owned(),
    };
    let json: Result<&RawValue, _> = serde_json::from_str(&text);
    json.map(|json| json.get().to_owned()).map_err(|error| format!("--payload is not JSON: {error}"))
}

/// Turns the NAME=VALUE arguments into the text of a JSON object.
fn parse_headers(given: &[String]) -> Result<String, String> {
    let mut headers = BTreeMap::new();
    for header in given {
        let Some((name, value)) = header.split_once('=') else {
            return Err(format!("--header is {header:?}, which is not NAME=VALUE"));
        };
        if headers.insert(name, value).is_some() {
            return Err(format!("--header {name} is given twice"));
        }
    }
    Ok(serde_json::to_string(&headers).expect("strings can always be written as JSON"))
}

impl fmt::Display for Scheduled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(formatter)
    }
}

impl fmt::Display for Cancelled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cancelled {
            0 => write!(formatter, "nothing was pending"),
            rows => write!(formatter, "{rows} rows cancelled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_must_be_json() {
        assert_eq!(read_payload(r#" {"a": 1.10} "#), Ok(r#"{"a": 1.10}"#.into()));
        assert!(read_payload("{").expect_err("broken").starts_with("--payload is not JSON: "));
        assert!(read_payload("{} {}").is_err() && read_payload("").is_err());
        assert!(read_payload("@/nonexistent").expect_err("no file").contains("/nonexistent"));
    }

    #[test]
    fn a_header_is_a_name_and_a_value_and_is_given_once() {
        let parse = |given: &[&str]| parse_headers(&given.iter().map(|&header| header.to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(&["b=1=2", "a="]), Ok(r#"{"a":"","b":"1=2"}"#.into()));
        assert!(parse(&["a"]).expect_err("no value").starts_with("--header is \"a\""));
        assert!(parse(&["a=1", "a=2"]).is_err());
    }
}
