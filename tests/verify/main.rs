//! `cargo verify`: sets up what the tests need, runs the rig for a while, and passes the tests, on servers that all of them
//! share. What is given after `--` goes to the tests, a part of a name for instance; then there is no rig.
//!
//! `cargo verify -- model`: the model of the scheduler's core alone (`host/core/README.md`), which needs no server; with `--seed N
//! --steps M`, so many steps of large worlds; with `--mutants`, faults that it must name.
//!
//! `cargo verify -- newest`: the tests of behaviour alone, on PostgreSQL and RabbitMQ out of Docker images. What is given behind
//! it goes to them.

use std::process::{Command, ExitCode};

use anyhow::Context as _;
use harness::servers::Servers;
use harness::{build, image, repository, setup};

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
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if_eq("model").is_some() {
        return model(words);
    }
    let newest = words.next_if_eq("newest").is_some();
    if newest {
        image::unpack()?;
    }
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
    let mut tests = Command::new(&cargo);
    tests.arg("test").current_dir(repository());
    if newest {
        tests.args(["--package", "tidings-tests", "--test", "it", "--"]).args(words).env(image::NEWEST, "1");
        return Ok(tests.status().context("could not run cargo test")?.success());
    }
    if words.peek().is_none() {
        if !model(std::iter::empty())? {
            return Ok(false);
        }
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
    tests.args(["--workspace", "--"]).args(words).env(name, ports);
    Ok(tests.status().context("could not run cargo test")?.success())
}

/// Whether the model of the scheduler's core finds nothing wrong.
fn model(words: impl Iterator<Item = String>) -> anyhow::Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let model = Command::new(cargo)
        .args(["run", "--package", "tidings-model", "--"])
        .args(words)
        .current_dir(repository())
        .status()
        .context("could not run the model")?;
    Ok(model.success())
}
