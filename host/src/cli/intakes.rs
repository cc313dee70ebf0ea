//! `tidings intakes`: what waits in the queues of the intakes. Asks RabbitMQ.

use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use crate::broker::{Broker, QueueCounts};
use crate::cli::output::Output;
use crate::cli::{fail, fail_usage, printable};
use crate::config::BrokerArgs;
use crate::model::wake::Wake;

/// Where RabbitMQ is, and which intakes there are.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings intakes --intake orders.delayed=orders --json | jq '.[].waiting'")]
pub(super) struct IntakesArgs {
    #[command(flatten)]
    broker: BrokerArgs,
}

/// One intake.
#[derive(Debug, Serialize)]
struct IntakeLine {
    from: String,
    to: String,
    queue: String,
    /// How many messages wait in its queue; `None` = there is no such queue.
    waiting: Option<u32>,
    /// How many daemons take from it.
    daemons: Option<u32>,
}

/// Prints a line for each intake.
pub(super) async fn intakes(args: IntakesArgs, output: Output) -> ExitCode {
    let settings = match args.broker.check() {
        Ok(settings) => settings,
        Err(errors) => return fail_usage(&errors),
    };
    let broker = Broker::new(&settings, Arc::new(Wake::default()));
    let counts = match broker.inspect_intakes().await {
        Ok(counts) => counts,
        Err(error) => return fail(1, &error.into()),
    };
    let line = |(intake, counts): (Arc<crate::model::intake::Intake>, Option<QueueCounts>)| IntakeLine {
        queue: intake.queue(broker.exchange()),
        from: intake.from.clone(),
        to: intake.to.clone(),
        waiting: counts.map(|counts| counts.messages),
        daemons: counts.map(|counts| counts.consumers),
    };
    let lines: Vec<IntakeLine> = counts.into_iter().map(line).collect();
    if lines.is_empty() {
        output.line("there is no intake: TIDINGS_INTAKE names none");
    }
    for line in &lines {
        output.line(line);
    }
    output.json(&lines);
    ExitCode::SUCCESS
}

impl fmt::Display for IntakeLine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to, queue) = (printable(&self.from), printable(&self.to), printable(&self.queue));
        write!(formatter, "{from} → {to}: ")?;
        match (self.waiting, self.daemons) {
            (Some(waiting), Some(daemons)) => {
                write!(formatter, "{waiting} messages wait in {queue}, from which {daemons} daemons take")
            }
            _ => write!(formatter, "there is no queue {queue}; the daemon declares it when it starts"),
        }
    }
}
