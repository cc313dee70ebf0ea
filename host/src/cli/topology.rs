//! `tidings topology`: what the daemon needs in RabbitMQ, as definitions to import.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use crate::broker::Broker;
use crate::cli::{output, usage};
use crate::config::BrokerArgs;
use crate::model::wake::Wake;

/// For which settings, and which user.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  tidings topology --queue-type quorum > tidings.json && rabbitmqctl import_definitions tidings.json"
)]
pub(super) struct TopologyArgs {
    #[command(flatten)]
    broker: BrokerArgs,
    /// With the permissions of a user who declares all of it, instead of those of one who only uses it
    #[arg(long)]
    declares: bool,
}

/// Prints it; no server is asked.
pub(super) fn topology(args: TopologyArgs) -> ExitCode {
    let settings = match args.broker.check() {
        Ok(settings) => settings,
        Err(mistakes) => return usage(&mistakes),
    };
    let definitions = Broker::new(&settings, Arc::new(Wake::default())).definitions(args.declares);
    output::print(format_args!("{definitions:#}"));
    ExitCode::SUCCESS
}
