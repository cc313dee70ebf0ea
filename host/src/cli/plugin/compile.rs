//! `tidings plugin compile`: the process in which the daemon has a component compiled. It reads the component from its
//! standard input; what is wrong with it goes to the standard error.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::cli::output::complain;
use crate::plugins::{CODE_NOT_CACHED, compile_here};

/// How it is called.
#[derive(Args, Debug)]
pub(crate) struct CompileArgs {
    metering: String,
    cache: PathBuf,
}

pub(super) fn compile(args: &CompileArgs) -> anyhow::Result<ExitCode> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    match compile_here(&args.metering, &args.cache, &bytes) {
        Ok(None) => Ok(ExitCode::SUCCESS),
        Ok(Some(why)) => {
            complain(why);
            Ok(ExitCode::from(CODE_NOT_CACHED))
        }
        Err(reason) => {
            complain(reason);
            Ok(ExitCode::FAILURE)
        }
    }
}
