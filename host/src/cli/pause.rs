//! `tidings pause` and `tidings resume`: an operator stops a kind, or a recurrence, and lets it go on. The rows of the kind stay
//! in the queue.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;

use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, pause_sentence, printable, recurrences, times, with_store};
use crate::config::DatabaseArgs;
use crate::model::row_status::Pause;
use crate::store::{Store, Until};

/// What to pause, and until when.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  tidings pause game-reminder --for 2h --reason 'the mail server is down'\n  \
                        tidings pause --recurrence nightly-report")]
pub(super) struct PauseArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind
    #[arg(required_unless_present = "recurrence", conflicts_with = "recurrence")]
    kind: Option<String>,
    /// A recurrence, in place of a kind: it makes no occurrences
    #[arg(long, value_name = "NAME", conflicts_with_all = ["until", "span", "reason"])]
    recurrence: Option<String>,
    /// When the pause ends by itself, in RFC 3339; without --until and --for only `tidings resume` ends it
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant, conflicts_with = "span")]
    until: Option<OffsetDateTime>,
    /// How long it lasts, such as 15min or 2h
    #[arg(long = "for", id = "span", value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    span: Option<Duration>,
    /// The reason, shown wherever the pause is shown
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// What to resume.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  tidings resume game-reminder\n  tidings resume --recurrence nightly-report")]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind
    #[arg(required_unless_present = "recurrence", conflicts_with = "recurrence")]
    kind: Option<String>,
    /// A recurrence, in place of a kind
    #[arg(long, value_name = "NAME")]
    recurrence: Option<String>,
}

/// What `tidings pause` answers.
#[derive(Debug, Serialize)]
struct Paused {
    #[serde(flatten)]
    pause: Pause,
    /// How many daemons serve the kind.
    daemons: i64,
}

/// What `tidings resume` answers.
#[derive(Debug, Serialize)]
struct Resumed {
    kind: String,
    resumed: bool,
}

pub(super) async fn pause(args: PauseArgs, output: Output) -> ExitCode {
    let PauseArgs { database, kind, recurrence, until, span, reason } = args;
    if let Some(name) = recurrence {
        return recurrences::pause(database, name, true, output).await;
    }
    let kind = kind.unwrap_or_default();
    let until = match (until, span) {
        (Some(at), _) => Until::At(at),
        (None, Some(span)) => Until::After(span),
        (None, None) => Until::Resumed,
    };
    with_store(database, async |store: Store| {
        let pause = store.pause(&kind, until, reason.as_deref()).await?;
        let daemons = store.count_daemons(&kind).await?;
        if daemons == 0 {
            complain(format_args!("tidings: no daemon serves the kind {} now; is that its name?", printable(&kind)));
        }
        output.answer(&Paused { pause, daemons });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

pub(super) async fn resume(args: ResumeArgs, output: Output) -> ExitCode {
    let ResumeArgs { database, kind, recurrence } = args;
    if let Some(name) = recurrence {
        return recurrences::pause(database, name, false, output).await;
    }
    let kind = kind.unwrap_or_default();
    with_store(database, async |store: Store| {
        let resumed = store.resume(&kind).await?;
        output.answer(&Resumed { kind, resumed });
        Ok(if resumed { ExitCode::SUCCESS } else { ExitCode::from(NOT_FOUND) })
    })
    .await
}

impl fmt::Display for Paused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}; what was in flight is finished", pause_sentence(&self.pause))
    }
}

impl fmt::Display for Resumed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = printable(&self.kind);
        if self.resumed {
            write!(formatter, "the kind {kind} goes on")
        } else {
            write!(formatter, "the kind {kind} is not paused")
        }
    }
}
