//! `tidings completions`: what a shell needs to complete the command line.

use std::process::ExitCode;

use clap::{Args, Command};
use clap_complete::{Shell, generate};

use crate::cli::output;

/// The shell to complete for.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings completions bash > ~/.local/share/bash-completion/completions/tidings")]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn completions(args: &CompletionsArgs, mut command: Command) -> ExitCode {
    let mut script = Vec::new();
    generate(args.shell, &mut command, "tidings", &mut script);
    output::print(String::from_utf8_lossy(&script).trim_end());
    ExitCode::SUCCESS
}
