//! `tidings topology`: what the daemon needs in RabbitMQ, as definitions to import.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use crate::broker::Broker;
use crate::cli::{fail_usage, output};
use crate::config::BrokerArgs;
use crate::model::wake::Wake;

/// The settings and the user that the definitions are for.
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

/// Prints the definitions. Asks no server.
pub(super) fn topology(args: TopologyArgs) -> ExitCode {
    let settings = match args.broker.check() {
        Ok(settings) => settings,
        Err(errors) => return fail_usage(&errors),
    };
    let definitions = Broker::new(&settings, Arc::new(Wake::default())).definitions(args.declares);
    output::print(format_args!("{definitions:#}"));
    ExitCode::SUCCESS
}
