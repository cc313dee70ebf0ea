//! `cargo verify`: sets up what the tests need, runs the rig for a while, and passes the tests, on servers that all of them
//! share. What is given after `--` goes to the tests, a part of a name for instance; then there is no rig.

use std::process::{Command, ExitCode};

use anyhow::Context as _;
use harness::servers::Servers;
use harness::{build, repository, setup};

fn main() -> ExitCode {
    match verify() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("verify: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn verify() -> anyhow::Result<bool> {
    eprintln!("building the daemon and the plugins ...");
    build::daemon()?;
    build::plugins()?;
    build::fixtures()?;
    eprintln!("building plugins with the tools of other languages (the first time takes minutes) ...");
    build::cargo_component("message")?;
    build::javascript()?;
    build::python()?;
    eprintln!("building the example consumers ...");
    build::rust_consumer()?;
    build::python_consumer()?;
    setup::chromium()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    if std::env::args().len() == 1 {
        eprintln!("breaking things for a while ...");
        let rig = Command::new(&cargo)
            .args(["run", "--package", "tidings-tests", "--bin", "rig", "--"])
            // Always the same faults: what is random is when they hit.
            .args(["--seconds", "90", "--seed", "5", "--daemons", "2", "--rate", "200"])
            .current_dir(repository())
            .status()
            .context("could not run the rig")?;
        if !rig.success() {
            return Ok(false);
        }
    }
    eprintln!("starting a PostgreSQL and a RabbitMQ of our own ...");
    let servers = Servers::start()?;
    let (name, ports) = servers.environment();
    let tests = Command::new(cargo)
        .args(["test", "--workspace", "--"])
        .args(std::env::args().skip(1))
        .current_dir(repository())
        .env(name, ports)
        .status()
        .context("could not run cargo test")?;
    Ok(tests.success())
}
