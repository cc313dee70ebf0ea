//! `tidings plugin compile`: the process that compiles a component for the daemon, so that the daemon can kill it. It
//! reads the component from standard input and reports errors on standard error.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::cli::output::complain;
use crate::plugins::{CODE_NOT_CACHED, compile_in_this_process};

/// The arguments that the daemon passes.
#[derive(Args, Debug)]
pub(crate) struct CompileArgs {
    metering: String,
    cache: PathBuf,
}

pub(super) fn compile(args: &CompileArgs) -> anyhow::Result<ExitCode> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    match compile_in_this_process(&args.metering, &args.cache, &bytes) {
        Ok(None) => Ok(ExitCode::SUCCESS),
        Ok(Some(reason)) => {
            complain(reason);
            Ok(ExitCode::from(CODE_NOT_CACHED))
        }
        Err(reason) => {
            complain(reason);
            Ok(ExitCode::FAILURE)
        }
    }
}
