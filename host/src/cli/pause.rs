//! `tidings pause` and `tidings resume`: an operator stops a kind and lets it go on. The rows of the kind stay in the
//! queue.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;

use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, pause_sentence, printable, times, with_store};
use crate::config::DatabaseArgs;
use crate::model::row_status::Pause;
use crate::store::{Store, Until};

/// What to pause, and until when.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings pause game-reminder --for 2h --reason 'the mail server is down'")]
pub(super) struct PauseArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind
    kind: String,
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
#[command(after_help = "Example:\n  tidings resume game-reminder")]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The kind
    kind: String,
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
    let PauseArgs { database, kind, until, span, reason } = args;
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
    let ResumeArgs { database, kind } = args;
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
