//! The example consumers, ready to run: the one in Rust built, the one in Python with the packages that it needs. Each is
//! made once a process, since every test of them asks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

use super::languages::{guard, pip_install, tools};
use super::{cargo, run};
use crate::{profile_dir, repository};

/// Builds the consumer in Rust in the profile of this program, and returns the path of the binary.
///
/// # Errors
///
/// When cargo fails; it has said why.
pub fn rust_consumer() -> anyhow::Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    once(&BUILT, || {
        let profile = profile_dir();
        let mut cargo = cargo();
        // With the daemon, for the same reason as the daemon with the tests.
        cargo.args(["build", "--quiet", "--package", "tidings", "--package", "tidings-tests", "--example", "consumer"]);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        run(cargo)?;
        Ok(profile.join("examples/consumer"))
    })
}

/// Installs the packages of the consumer in Python, and returns its source and the directory for `PYTHONPATH`.
///
/// # Errors
///
/// When they cannot be installed.
pub fn python_consumer() -> anyhow::Result<(PathBuf, PathBuf)> {
    static INSTALLED: Mutex<Option<(PathBuf, PathBuf)>> = Mutex::new(None);
    once(&INSTALLED, || {
        let _guard = guard();
        let (examples, packages) = (repository().join("tests/examples"), tools().join("consumer-py"));
        let requirements = examples.join("requirements.txt");
        // Written when all is there, and so absent after an install that broke off.
        let finished = packages.join("finished");
        if fs::read_to_string(&finished).ok() != Some(what_for(&requirements)?) {
            eprintln!("installing the packages of the consumer in Python ...");
            // pip does not replace what is there.
            let _ = fs::remove_dir_all(&packages);
            pip_install(&requirements, &packages)?;
            fs::write(finished, what_for(&requirements)?)?;
        }
        Ok((examples.join("consumer.py"), packages))
    })
}

/// What an install is good for: these packages, and this Python, since some of them are compiled for it.
fn what_for(requirements: &Path) -> anyhow::Result<String> {
    let listed = fs::read_to_string(requirements).context("the consumer's requirements.txt")?;
    // None before there is a Python at all.
    let python = Command::new("python3").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    Ok(format!("{}{listed}", String::from_utf8_lossy(&python)))
}

/// What `make` made, the first time that it succeeded.
fn once<T: Clone>(made: &Mutex<Option<T>>, make: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = &*made {
        return Ok(made.clone());
    }
    let new = make()?;
    *made = Some(new.clone());
    Ok(new)
}
