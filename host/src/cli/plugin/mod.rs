//! `tidings plugin …`: the tools for authors of plugins.
//!
//! Must never judge a plugin by rules of its own: the commands use the loader, the engine and the limits of the daemon.
//!
//! To change it, know: `compile` is called by the daemon, not by people. `fixture` is the JSON form in which `test` and
//! `replay` compare outcomes.

mod check;
mod compile;
mod fixture;
mod install;
mod list;
mod new;
mod replay;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};

use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, fail};
use crate::config::StateArgs;
use crate::plugins::{Engine, LoadError, Metering, Plugin, StateDir};

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Writes a new plugin that builds as it stands, without a network
    #[command(after_help = "Example:\n  tidings plugin new greeting")]
    New(new::NewArgs),
    /// Says whether the daemon would serve a file, and if not, why and what to do
    #[command(after_help = "Example:\n  tidings plugin check target/wasm32-wasip2/release/greeting.wasm")]
    Check(PluginArgs),
    /// Builds the rows of fixtures/ and compares what becomes of them with what is expected
    #[command(after_help = "Example:\n  tidings plugin test target/wasm32-wasip2/release/greeting.wasm")]
    Test(test::TestArgs),
    /// Shows what serves in the running daemon
    #[command(after_help = "Example:\n  tidings plugin list --http-addr 127.0.0.1:7070")]
    List(list::ListArgs),
    /// Checks a file and puts it into the daemon's plugin directory
    #[command(after_help = "Example:\n  tidings plugin install greeting.wasm --plugin-dir /srv/plugins")]
    Install(install::InstallArgs),
    /// Builds rows that were delivered with another version, and shows how their events would differ
    #[command(after_help = "Example:\n  tidings plugin replay greeting.wasm --last 1000")]
    Replay(replay::ReplayArgs),
    /// Compiles a component into a cache; the daemon calls it
    #[command(hide = true)]
    Compile(compile::CompileArgs),
}

/// A plugin's file, and the directory for compiled code.
#[derive(Args, Debug)]
pub(super) struct PluginArgs {
    /// The plugin, NAME.wasm
    file: PathBuf,
    /// Its settings, if they do not lie beside it as NAME.toml
    #[arg(long, value_name = "TOML")]
    settings: Option<PathBuf>,
    #[command(flatten)]
    state: StateArgs,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    let result = match command {
        Command::New(args) => new::new(&args, output),
        Command::Check(args) => check::check(&args, output).await,
        Command::Test(args) => test::test(&args, output).await,
        Command::List(args) => list::list(args, output),
        Command::Install(args) => install::install(&args, output).await,
        Command::Replay(args) => replay::replay(args, output).await,
        Command::Compile(args) => compile::compile(&args),
    };
    result.unwrap_or_else(|error| {
        let is_missing = error.downcast_ref::<LoadError>().is_some_and(LoadError::is_not_found);
        fail(if is_missing { NOT_FOUND } else { 1 }, &error)
    })
}

impl PluginArgs {
    /// Loads the plugin as the daemon would.
    async fn open(&self, metering: Metering) -> anyhow::Result<Arc<Plugin>> {
        open(&create_engine(&self.state, metering)?, &self.file, self.settings.as_deref()).await
    }
}

/// Creates an engine like the daemon's. If the directory for compiled code cannot be used, the engine compiles every
/// time.
fn create_engine(state: &StateArgs, metering: Metering) -> anyhow::Result<Arc<Engine>> {
    let state = match StateDir::open(&state.dir()) {
        Ok(state) => Some(state),
        Err(error) => {
            complain(format_args!("tidings: {:#}; going on without it", anyhow::Error::from(error)));
            None
        }
    };
    Ok(Engine::new(state.as_ref(), metering)?)
}

/// Loads a plugin from a file.
async fn open(engine: &Arc<Engine>, file: &Path, settings: Option<&Path>) -> anyhow::Result<Arc<Plugin>> {
    let opened = Plugin::open(engine, file, settings).await;
    Ok(Arc::new(
        opened.map_err(|error| anyhow::Error::from(error).context(format!("{} would be refused", file.display())))?,
    ))
}
