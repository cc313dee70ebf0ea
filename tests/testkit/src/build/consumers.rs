//! Makes the example consumers ready to run: builds the one in Rust, and installs the packages of the one in Python.
//! Each is done once per process, because every test of a consumer calls these functions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

use super::languages::{lock_tools, pip_install, tools_dir};
use super::{cargo, run};
use crate::{profile_dir, repository};

/// Builds the consumer in Rust with the cargo profile of this program, and returns the path of the binary.
///
/// # Errors
///
/// When cargo fails; cargo has then printed the reason.
pub fn rust_consumer() -> anyhow::Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    make_once(&BUILT, || {
        let profile = profile_dir();
        let mut cargo = cargo();
        // Built together with the daemon, so that features are resolved in the same way and nothing is compiled twice.
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
/// When the packages cannot be installed.
pub fn python_consumer() -> anyhow::Result<(PathBuf, PathBuf)> {
    static INSTALLED: Mutex<Option<(PathBuf, PathBuf)>> = Mutex::new(None);
    make_once(&INSTALLED, || {
        let _guard = lock_tools();
        let (examples, packages) = (repository().join("tests/examples"), tools_dir().join("consumer-py"));
        let requirements = examples.join("requirements.txt");
        // Written last, so it is missing after an interrupted installation.
        let finished = packages.join("finished");
        if fs::read_to_string(&finished).ok() != Some(installation_id(&requirements)?) {
            eprintln!("installing the packages of the consumer in Python ...");
            // pip does not replace packages that are already in the directory.
            let _ = fs::remove_dir_all(&packages);
            pip_install(&requirements, &packages)?;
            fs::write(finished, installation_id(&requirements)?)?;
        }
        Ok((examples.join("consumer.py"), packages))
    })
}

/// Identifies an installation: the listed packages, and the version of Python, because some packages are compiled for
/// it.
fn installation_id(requirements: &Path) -> anyhow::Result<String> {
    let listed = fs::read_to_string(requirements).context("the consumer's requirements.txt")?;
    // Empty if Python is not installed yet.
    let python = Command::new("python3").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    Ok(format!("{}{listed}", String::from_utf8_lossy(&python)))
}

/// Returns the value that `make` produced the first time it succeeded, and calls `make` only if there is none yet.
fn make_once<T: Clone>(made: &Mutex<Option<T>>, make: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = &*made {
        return Ok(made.clone());
    }
    let new = make()?;
    *made = Some(new.clone());
    Ok(new)
}
