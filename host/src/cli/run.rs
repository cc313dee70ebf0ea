//! `tidings run`: the daemon.

use std::process::ExitCode;

use crate::cli::{SCHEMA, fail};
use crate::config::Config;
use crate::daemon;
use crate::daemon::signals;
use crate::telemetry::Traces;

pub(super) async fn run(config: Config) -> ExitCode {
    let traces = match Traces::start(config.servers.traces.as_ref()) {
        Ok(traces) => traces,
        Err(error) => return fail(1, &anyhow::Error::from(error).context("could not start the traces")),
    };
    let signals = signals::shutdown_on_signal().and_then(|shutdown| Ok((shutdown, signals::Signals::non_fatal()?)));
    let ended = match signals {
        Ok((shutdown, hangups)) => daemon::run(config, hangups, shutdown).await,
        Err(error) => Err(anyhow::Error::from(error).context("could not listen for signals")),
    };
    // Last, however the daemon ended: work that was in flight at its end made spans as well.
    traces.stop().await;
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if daemon::is_schema_error(&error) => fail(SCHEMA, &error),
        Err(error) => fail(1, &error),
    }
}
