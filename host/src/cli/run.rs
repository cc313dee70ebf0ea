//! `tidings run`: the daemon.

use std::process::ExitCode;

use super::{SCHEMA, fail};
use crate::config::Config;
use crate::telemetry::Traces;
use crate::{daemon, lifecycle};

pub(super) async fn run(config: Config) -> ExitCode {
    let traces = match Traces::start(config.servers.traces.as_ref()) {
        Ok(traces) => traces,
        Err(error) => return fail(1, &anyhow::Error::from(error).context("could not start the traces")),
    };
    let signals = lifecycle::shutdown_on_signal().and_then(|shutdown| Ok((shutdown, lifecycle::Signals::to_go_on()?)));
    let ended = match signals {
        Ok((shutdown, hangups)) => daemon::run(config, hangups, shutdown).await,
        Err(error) => Err(anyhow::Error::from(error).context("could not listen for signals")),
    };
    // However it ended, and last: what was in flight made spans.
    traces.stop().await;
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if daemon::is_schema_error(&error) => fail(SCHEMA, &error),
        Err(error) => fail(1, &error),
    }
}
