//! `tidings explain`: where a row is, and why.

use std::fmt;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::output::{Output, complain};
use super::{NOT_FOUND, answered, pause_sentence, printable, times};
use crate::config::DatabaseArgs;
use crate::store::Store;
use crate::whereabouts::{Found, Whereabouts, Which};

/// Which row.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  tidings explain 0199a6b2-1c2d-7000-8000-000000000001\n  \
                        tidings explain 'game-reminder/game 7/60'")]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The id of a row (which is the id of its message), or its kind and key
    #[arg(value_name = "ID|KIND/KEY")]
    which: Which,
}

/// What `tidings explain` answers.
#[derive(Debug, Serialize)]
struct Explanation {
    #[serde(flatten)]
    found: Found,
    /// All of it, for people.
    explanation: String,
}

pub(super) async fn explain(args: ExplainArgs, output: Output) -> ExitCode {
    answered(args.database, async |store: Store| {
        let Some(found) = store.find(&args.which).await? else {
            complain(format_args!("tidings: {}", never_heard_of(&args.which)));
            return Ok(ExitCode::from(NOT_FOUND));
        };
        let explanation = sentence(&found);
        output.answer(&Explanation { found, explanation });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

fn never_heard_of(which: &Which) -> String {
    match which {
        Which::Id(id) => format!(
            "nothing is known of {id}: it was cancelled, or replaced or rescheduled under a new id, or never scheduled here, or finished before the history begins; if it was delivered, its message may lie among the dead letters: tidings dead list"
        ),
        Which::Key { kind, key } => format!(
            "nothing is known of the kind {} with the key {}: it was cancelled, or never scheduled here, or finished before the history begins",
            printable(kind),
            printable(key)
        ),
    }
}

/// Where it is, and why, in one line.
fn sentence(found: &Found) -> String {
    let Found { kind, attempts, .. } = found;
    let by = |plugin: &Option<String>| plugin.as_ref().map(|plugin| format!(" by {plugin}")).unwrap_or_default();
    let because = |reason: &Option<String>| reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let sentence = match &found.whereabouts {
        Whereabouts::Waiting { until, pause } => {
            let pause = pause.as_ref().map(|pause| format!("; {}", pause_sentence(pause))).unwrap_or_default();
            format!("waits until it is due, at {}{pause}", times::show(*until))
        }
        Whereabouts::Due { past_deadline: true, daemons, .. } => {
            format!(
                "its deadline has come: the next daemon that looks finishes it as expired; {}",
                serving(kind, *daemons)
            )
        }
        Whereabouts::Due { late_seconds, daemons, .. } => {
            format!("due for {late_seconds:.1} s, and not taken yet; {}", serving(kind, *daemons))
        }
        Whereabouts::Locked { late_seconds, by } => format!("due for {late_seconds:.1} s, and locked by {by}"),
        Whereabouts::BackingOff { until, last_error } => format!(
            "backs off after {attempts} attempts, and is tried again at {}{}",
            times::show(*until),
            because(last_error)
        ),
        Whereabouts::Held { daemons: 0 } => {
            format!("held: no daemon serves the kind {kind}; put its plugin into the plugin directory of one")
        }
        Whereabouts::Held { .. } => {
            format!("held, since no daemon served the kind {kind}; now one does, and is about to release it")
        }
        Whereabouts::Paused { pause } => format!("due, and held: {}", pause_sentence(pause)),
        Whereabouts::Parked { parked_at, reason, plugin } => format!(
            "parked at {} after {attempts} attempts{}: {reason}; put it back with `tidings parked retry {}`",
            times::show(*parked_at),
            by(plugin),
            found.id
        ),
        Whereabouts::Delivered { finished_at, late_seconds, plugin } => format!(
            "delivered at {}, {late_seconds:.3} s after it was due{}; if no consumer has it, its message may lie among the dead letters: tidings dead list",
            times::show(*finished_at),
            plugin.as_ref().map(|plugin| format!(", built by {plugin}")).unwrap_or_default()
        ),
        Whereabouts::Expired { finished_at, reason } => {
            format!("expired, and never sent; finished at {}{}", times::show(*finished_at), because(reason))
        }
        Whereabouts::Skipped { finished_at, reason, plugin } => {
            format!("skipped at {}{}, and nothing was sent{}", times::show(*finished_at), by(plugin), because(reason))
        }
    };
    printable(&sentence)
}

fn serving(kind: &str, daemons: i64) -> String {
    match daemons {
        0 => format!("no daemon serves the kind {kind} now"),
        1 => format!("one daemon serves the kind {kind}"),
        daemons => format!("{daemons} daemons serve the kind {kind}"),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { id, kind, key, subject, due_at, expires_at, .. } = &self.found;
        let mut field = |name: &str, value: &str| writeln!(formatter, "{name:<8} {}", printable(value));
        field("id", &id.to_string())?;
        field("kind", kind)?;
        for (name, value) in [("key", key), ("subject", subject)] {
            if let Some(value) = value {
                field(name, value)?;
            }
        }
        field("due", &times::show(*due_at))?;
        if let Some(expires_at) = expires_at {
            field("expires", &times::show(*expires_at))?;
        }
        write!(formatter, "{}", self.explanation)
    }
}
