//! `cargo verify` sets up what the tests need, runs the model, 90 seconds of the rig and 60 of the rig with clusters, and
//! then runs the tests on servers that all of them share. Arguments after `--` are passed to the tests, for example a
//! part of a name; the model and the rig are then left out.
//!
//! `cargo verify -- model` runs only the model of the scheduler's core (`host/core/README.md`), which needs no server.
//! With `--seed N --steps M` it runs M steps of large worlds; with `--mutants` it checks that the model finds
//! deliberate faults.
//!
//! `cargo verify -- newest` runs only the tests of behaviour, on PostgreSQL and RabbitMQ from Docker images. Further
//! arguments are passed to them.

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
        return run_model(words);
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
    setup::find_chromium()?;
    if !newest {
        setup::install_for_tests()?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut tests = Command::new(&cargo);
    tests.arg("test").current_dir(repository());
    if newest {
        tests.args(["--package", "tidings-tests", "--test", "it", "--"]).args(words).env(image::NEWEST_VARIABLE, "1");
        return Ok(tests.status().context("could not run cargo test")?.success());
    }
    if words.peek().is_none() {
        if !run_model(std::iter::empty())? {
            return Ok(false);
        }
        let tests_of_model =
            Command::new(&cargo).args(["test", "--package", "tidings-model"]).current_dir(repository()).status();
        if !tests_of_model.context("could not run the tests of the model")?.success() {
            return Ok(false);
        }
        eprintln!("running the rig: faults at random for 90 s ...");
        // The seed fixes the faults; only their timing relative to the daemons' work varies.
        if !run_rig(&["--seconds", "90", "--seed", "5", "--daemons", "2", "--rate", "200"])? {
            return Ok(false);
        }
        eprintln!("running the rig with clusters: failovers and nodes that go away, for 60 s ...");
        // With this seed the primary is killed, then a node of RabbitMQ, and then the next primary is frozen.
        if !run_rig(&["--cluster", "--seconds", "60", "--seed", "4256", "--daemons", "2", "--rate", "200"])? {
            return Ok(false);
        }
    }
    eprintln!("starting a private PostgreSQL and RabbitMQ ...");
    let servers = Servers::start()?;
    let (name, ports) = servers.environment();
    // With the model, serde would have another feature, and nearly every dependency would be compiled once more. One failure does not
    // hide those of later packages.
    tests.args(["--workspace", "--exclude", "tidings-model", "--no-fail-fast", "--"]).args(words).env(name, ports);
    Ok(tests.status().context("could not run cargo test")?.success())
}

/// Runs the rig, and returns whether every promise was kept.
fn run_rig(arguments: &[&str]) -> anyhow::Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let rig = Command::new(cargo)
        .args(["run", "--package", "tidings-tests", "--bin", "rig", "--"])
        .args(arguments)
        .current_dir(repository())
        .status()
        .context("could not run the rig")?;
    Ok(rig.success())
}

/// Runs the model of the scheduler's core, and returns whether it found no violation.
fn run_model(words: impl Iterator<Item = String>) -> anyhow::Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let model = Command::new(cargo)
        .args(["run", "--package", "tidings-model", "--"])
        .args(words)
        .current_dir(repository())
        .status()
        .context("could not run the model")?;
    Ok(model.success())
}
