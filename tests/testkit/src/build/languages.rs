//! Builds plugins with `cargo component`, and in JavaScript and Python. Each tool is installed from its ordinary
//! registry when it is first needed, below the target directory and nowhere else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::Context as _;

use super::{Toolchain, cargo, debian_cargo, find_toolchain, run};
use crate::{repository, setup, target};

/// The tools share registries and caches, and each of them uses all processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// The last release: the project is no longer developed.
const CARGO_COMPONENT: &str = "0.21.1";

pub(super) fn tools_dir() -> PathBuf {
    target().join("tools")
}

fn sources_dir() -> PathBuf {
    repository().join("tests/fixtures/languages")
}

pub(super) fn lock_tools() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Builds one of the repository's plugins with `cargo component build`, and returns the component.
///
/// # Errors
///
/// When a tool cannot be installed, or fails.
pub fn cargo_component(plugin: &str) -> anyhow::Result<PathBuf> {
    let _guard = lock_tools();
    let tool = tools_dir().join("bin/cargo-component");
    if !tool.exists() {
        eprintln!("installing cargo-component (some minutes) ...");
        let build = tools_dir().join("build");
        let mut install = cargo();
        // A debug build: the tool's own speed does not matter, but its build time does.
        install.args(["install", "--quiet", "--debug", "--locked", "cargo-component", "--version", CARGO_COMPONENT]);
        install.arg("--root").arg(tools_dir()).env("CARGO_TARGET_DIR", &build).env("CARGO_PROFILE_DEV_DEBUG", "0");
        run(install)?;
        fs::remove_dir_all(build)?;
    }
    let toolchain = find_toolchain()?;
    let triple = toolchain.triple();
    // cargo-component makes the component itself, from the output of the ordinary linker.
    let toolchain = match toolchain {
        Toolchain::Installed(_) => cargo(),
        Toolchain::Debian => debian_cargo(),
    };
    let mut component = Command::new(tool);
    component.args(["component", "build", "--quiet", "--release", "--target", triple]);
    // The arguments and the environment that the toolchain needs, and its cargo.
    component.args(toolchain.get_args());
    for (name, value) in toolchain.get_envs() {
        match value {
            Some(value) => component.env(name, value),
            None => component.env_remove(name),
        };
    }
    component.env("CARGO", toolchain.get_program()).env("CARGO_TARGET_DIR", target().join("component"));
    component.current_dir(repository().join("plugins").join(plugin));
    run(component)?;
    // The crate generates its own bindings and does not use the file that cargo-component writes.
    let _ = fs::remove_file(repository().join("plugins").join(plugin).join("src/bindings.rs"));
    Ok(target().join("component").join(triple).join("release").join(format!("{plugin}.wasm")))
}

/// Builds the plugin in JavaScript, and returns the component.
///
/// # Errors
///
/// As [`cargo_component`].
pub fn javascript() -> anyhow::Result<PathBuf> {
    let _guard = lock_tools();
    let (tools, wasm) = (tools_dir().join("javascript"), target().join("fixtures/greeting-js.wasm"));
    let source = sources_dir().join("greeting.js");
    let jco = tools.join("node_modules/.bin/jco");
    if !jco.exists() {
        if !is_on_path("npm") {
            setup::install(&["nodejs", "npm"])?;
        }
        eprintln!("installing jco ...");
        fs::create_dir_all(&tools)?;
        for file in ["package.json", "package-lock.json"] {
            fs::copy(sources_dir().join(file), tools.join(file))?;
        }
        let mut npm = Command::new("npm");
        npm.args(["ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]).arg(&tools);
        run(npm)?;
    }
    if is_up_to_date(&source, &wasm) {
        return Ok(wasm);
    }
    let mut command = Command::new(jco);
    command.arg("componentize").arg(&source).arg("--wit").arg(repository().join("wit")).args(["-n", "plugin"]);
    command.args(["--disable", "http", "fetch-event", "clocks", "random", "-o"]).arg(&wasm);
    command.stdout(std::process::Stdio::null());
    run(command)?;
    Ok(wasm)
}

/// Builds the plugin in Python, and returns the component.
///
/// # Errors
///
/// As [`cargo_component`].
pub fn python() -> anyhow::Result<PathBuf> {
    let _guard = lock_tools();
    let (tools, wasm) = (tools_dir().join("python"), target().join("fixtures/greeting-py.wasm"));
    let source = sources_dir().join("greeting_py.py");
    let tool = tools.join("bin/componentize-py");
    if !tool.exists() {
        eprintln!("installing componentize-py ...");
        pip_install(&sources_dir().join("requirements.txt"), &tools)?;
    }
    if is_up_to_date(&source, &wasm) {
        return Ok(wasm);
    }
    // componentize-py leaves files beside the source, so it works on a copy.
    let work = tools.join("work");
    fs::create_dir_all(&work)?;
    fs::copy(&source, work.join("greeting_py.py"))?;
    let mut command = Command::new("python3");
    command.arg(tool).env("PYTHONPATH", &tools).args(["-q", "-d"]).arg(repository().join("wit"));
    command
        .args(["-w", "plugin", "componentize", "--stub-wasi", "-p"])
        .arg(work)
        .args(["greeting_py", "-o"])
        .arg(&wasm);
    run(command)?;
    Ok(wasm)
}

/// Whether `built` is newer than `source` and the contract. Each of these tools takes half a minute.
fn is_up_to_date(source: &Path, built: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let newest = modified(source).max(modified(&repository().join("wit/plugin.wit")));
    modified(built).is_some_and(|built| Some(built) > newest)
}

fn is_on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
}

/// Installs the packages that `requirements` lists into `dir`, without their dependencies.
pub(super) fn pip_install(requirements: &Path, dir: &Path) -> anyhow::Result<()> {
    if !has_pip() {
        setup::install(&["python3", "python3-pip"])?;
    }
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action", "ignore"]);
    pip.args(["--no-deps", "--target"]).arg(dir).arg("-r").arg(requirements);
    run(pip)
}

fn has_pip() -> bool {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output().context("no python3");
    pip.is_ok_and(|output| output.status.success())
}
