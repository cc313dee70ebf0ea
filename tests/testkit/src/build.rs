//! Builds the daemon and the plugins with cargo, as a user would. A compiler with a WebAssembly target is found in this
//! order: an installed target; Debian's own compiler, if it is installed; `rustup target add`; Debian's own compiler,
//! installed with apt. Debian's compiler has no standard library for WebAssembly, so it is built from source.

mod base;
mod consumers;
mod languages;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::{command_line, profile_dir, repository, setup, target};

pub use base::daemon_of;
pub use consumers::{python_consumer, rust_consumer};
pub use languages::{cargo_component, javascript, python};

/// Debian's packages: a current compiler (under the names `rustc-web` and `cargo-web`), the source of its standard
/// library, and linkers.
const DEBIAN_PACKAGES: [&str; 5] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-llvm", "lld-22"];
/// The directory in which those packages install `wasm-component-ld`, the linker that makes components.
const DEBIAN_LINKERS: &str = "/usr/lib/rustlib/x86_64-unknown-linux-gnu/bin";

/// Builds `tidings` with the cargo profile of this program, and returns the path of the binary.
///
/// # Errors
///
/// When cargo fails; cargo has then printed the reason.
pub fn daemon() -> anyhow::Result<PathBuf> {
    let profile = profile_dir();
    let mut cargo = build_daemon();
    cargo.arg("--quiet");
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    run(cargo)?;
    Ok(profile.join("tidings"))
}

/// `cargo build` of the daemon, together with the running package: cargo then resolves features as it did for that
/// package, and compiles no dependency twice.
fn build_daemon() -> Command {
    let running = std::env::var("CARGO_PKG_NAME").unwrap_or_else(|_| "tidings-tests".to_owned());
    let mut cargo = cargo();
    cargo.args(["build", "--package", "tidings", "--package", &running, "--bin", "tidings"]);
    cargo
}

/// Builds the plugins of the repository into `target/plugins`, and returns that directory.
///
/// # Errors
///
/// When there is no way to build WebAssembly here, or cargo fails.
pub fn plugins() -> anyhow::Result<PathBuf> {
    let packages: Vec<String> = find_cdylib_packages(&repository().join("plugins"))?;
    let dir = target().join("plugins");
    build_packages(&packages, &dir)?;
    Ok(dir)
}

/// Builds the plugins of `tests/fixtures` into `target/fixtures`, and returns that directory.
///
/// # Errors
///
/// As [`plugins`].
pub fn fixtures() -> anyhow::Result<PathBuf> {
    let packages: Vec<String> = find_cdylib_packages(&repository().join("tests/fixtures"))?;
    let dir = target().join("fixtures");
    build_packages(&packages, &dir)?;
    Ok(dir)
}

/// The packages in `dir` that are built as WebAssembly: those whose crate type is `cdylib`.
fn find_cdylib_packages(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let manifest = fs::read_to_string(path.join("Cargo.toml")).unwrap_or_default();
        if manifest.contains("cdylib") {
            names.push(path.file_name().context("a directory has a name")?.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The targets for which the output of cargo is already a component.
const TARGETS: [&str; 2] = ["wasm32-wasip2", "wasm32-unknown-unknown"];

/// A compiler that builds WebAssembly components.
enum Toolchain {
    /// The default compiler, which has this target installed.
    Installed(&'static str),
    /// Debian's compiler, which builds its standard library from source.
    Debian,
}

/// Measures what one call of a plugin's function with `payload` costs as native code, without WebAssembly: runs the
/// plugin's test `measure` in release mode.
///
/// # Panics
///
/// When the test does not print a measurement.
#[must_use]
pub fn measure_native_call(plugin: &str, payload: &str) -> Duration {
    let mut cargo = cargo();
    cargo.args(["test", "--quiet", "--release", "--package", plugin, "--", "--ignored", "--nocapture", "measure"]);
    let output = cargo.env("MEASURED_PAYLOAD", payload).output().expect("cargo runs");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let nanoseconds = stdout.lines().find_map(|line| line.strip_prefix("measured ")?.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_else(|| panic!("{stdout}{}", String::from_utf8_lossy(&output.stderr))))
}

impl Toolchain {
    fn triple(&self) -> &'static str {
        match self {
            Self::Installed(triple) => triple,
            Self::Debian => "wasm32-unknown-unknown",
        }
    }

    /// This toolchain's cargo, with the environment that builds a component.
    fn cargo(&self) -> Command {
        let mut cargo = match self {
            Self::Installed(_) => cargo(),
            Self::Debian => debian_cargo(),
        };
        if self.triple() == "wasm32-unknown-unknown" {
            cargo.env("RUSTFLAGS", "-C linker=wasm-component-ld");
        }
        cargo
    }
}

/// Builds one of the repository's plugins for every available target, and returns each target's name with its
/// component. Debian's compiler has one target; with rustup, missing targets are installed if possible.
///
/// # Errors
///
/// As [`plugins`].
pub fn for_every_target(plugin: &str) -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    let toolchains = match find_toolchain()? {
        Toolchain::Debian => vec![Toolchain::Debian],
        Toolchain::Installed(_) => {
            let _ = Command::new("rustup").args(["target", "add"]).args(TARGETS).stdin(Stdio::null()).output();
            TARGETS.into_iter().filter(|triple| is_installed(triple)).map(Toolchain::Installed).collect()
        }
    };
    let mut built = Vec::new();
    for toolchain in toolchains {
        let (triple, mut cargo, dir) = (toolchain.triple(), toolchain.cargo(), target().join("wasm"));
        cargo.env("CARGO_TARGET_DIR", &dir);
        cargo.args(["build", "--quiet", "--profile", "plugin", "--target", triple, "--package", plugin]);
        run(cargo)?;
        built.push((triple, dir.join(triple).join("plugin").join(format!("{plugin}.wasm"))));
    }
    Ok(built)
}

/// Builds `packages` and puts each as `NAME.wasm` into `dir`.
fn build_packages(packages: &[String], dir: &Path) -> anyhow::Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().expect("no builder panicked");
    let toolchain = find_toolchain()?;
    let triple = toolchain.triple();
    let mut cargo = toolchain.cargo();
    cargo.env("CARGO_TARGET_DIR", target().join("wasm"));
    cargo.args(["build", "--quiet", "--profile", "plugin", "--target", triple]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    run(cargo)?;
    fs::create_dir_all(dir)?;
    for package in packages {
        let built =
            target().join("wasm").join(triple).join("plugin").join(format!("{}.wasm", package.replace('-', "_")));
        // Copied to a hidden name and then renamed, so that a daemon that reads the directory never sees half a file.
        let aside = dir.join(format!(".{package}.{}", std::process::id()));
        fs::copy(&built, &aside).with_context(|| format!("{} was not built", built.display()))?;
        fs::rename(&aside, dir.join(format!("{package}.wasm")))?;
    }
    Ok(())
}

/// Builds the crate in `dir`, which must have no dependencies, without network access, and returns the component.
///
/// # Errors
///
/// As [`plugins`].
pub fn component(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let toolchain = find_toolchain()?;
    let triple = toolchain.triple();
    let mut cargo = toolchain.cargo();
    cargo.env("CARGO_NET_OFFLINE", "true").env_remove("CARGO_TARGET_DIR").current_dir(dir);
    cargo.args(["build", "--quiet", "--release", "--target", triple]);
    run(cargo)?;
    Ok(dir.join("target").join(triple).join("release").join(format!("{}.wasm", name.replace('-', "_"))))
}

/// A shell script that stands in for `cargo`. `cargo build --release --target wasm32-wasip2` works with it even where
/// that target is not installed: the script builds the component with the available toolchain and copies it to the path
/// of the target. All other arguments are passed to the real cargo.
///
/// # Errors
///
/// As [`plugins`].
pub fn cargo_script() -> anyhow::Result<String> {
    let toolchain = find_toolchain()?;
    let triple = toolchain.triple();
    let mut build = toolchain.cargo();
    build.args(["build", "--release", "--target", triple]);
    let (any, component) = (command_line(&cargo()), command_line(&build));
    Ok(format!(
        "#!/bin/sh\nset -e\n[ \"$*\" = 'build --release --target wasm32-wasip2' ] || exec {any} \"$@\"\n{component}\n\
         [ {triple} = wasm32-wasip2 ] || install -D target/{triple}/release/*.wasm -t target/wasm32-wasip2/release\n"
    ))
}

/// Runs the tests of the crate in `dir`, without network access, and returns their output.
///
/// # Panics
///
/// When a test fails.
#[must_use]
pub fn cargo_test(dir: &Path) -> String {
    let mut cargo = cargo();
    cargo.current_dir(dir).env_remove("CARGO_TARGET_DIR").args(["test", "--offline"]);
    let output = cargo.output().expect("cargo runs");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

fn find_toolchain() -> anyhow::Result<Toolchain> {
    let installed = || TARGETS.into_iter().find(|triple| is_installed(triple));
    if let Some(triple) = installed() {
        return Ok(Toolchain::Installed(triple));
    }
    let debian = Path::new("/usr/lib/rustlib/src/rust/library").exists()
        && Path::new(DEBIAN_LINKERS).join("wasm-component-ld").exists();
    if debian {
        return Ok(Toolchain::Debian);
    }
    eprintln!("there is no WebAssembly target; trying: rustup target add {}", TARGETS[0]);
    let added = Command::new("rustup").args(["target", "add", TARGETS[0]]).stdin(Stdio::null()).output();
    if added.is_ok_and(|output| output.status.success())
        && let Some(triple) = installed()
    {
        return Ok(Toolchain::Installed(triple));
    }
    eprintln!("rustup could not add it; trying Debian's own compiler");
    setup::install(&DEBIAN_PACKAGES).with_context(|| {
        format!(
            "plugins cannot be built: add a target (rustup target add {}), or install Debian's compiler (apt-get install {})",
            TARGETS[0],
            DEBIAN_PACKAGES.join(" ")
        )
    })?;
    Ok(Toolchain::Debian)
}

/// Whether the default compiler has the standard library for `triple`.
fn is_installed(triple: &str) -> bool {
    let dir = Command::new(program("RUSTC", "rustc")).args(["--print", "target-libdir", "--target", triple]).output();
    dir.is_ok_and(|dir| dir.status.success() && Path::new(String::from_utf8_lossy(&dir.stdout).trim()).exists())
}

fn program(variable: &str, name: &str) -> OsString {
    std::env::var_os(variable).unwrap_or_else(|| name.into())
}

/// The cargo that built this program.
fn cargo() -> Command {
    let mut command = Command::new(program("CARGO", "cargo"));
    command.current_dir(repository());
    command
}

/// Debian's cargo, with the options that build the standard library too: Debian packages none for WebAssembly.
fn debian_cargo() -> Command {
    let mut command = Command::new("/usr/bin/cargo");
    command.current_dir(repository());
    // rustup set these variables for another compiler.
    for variable in ["RUSTUP_TOOLCHAIN", "RUSTUP_HOME", "CARGO", "RUSTC_WRAPPER", "LD_LIBRARY_PATH"] {
        command.env_remove(variable);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = [PathBuf::from(DEBIAN_LINKERS), "/usr/bin".into()].into_iter().chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(paths).expect("they were joined before"));
    command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1").args(["-Z", "build-std=std,panic_abort"]);
    command
}

fn run(mut command: Command) -> anyhow::Result<()> {
    // A cargo that runs this program has set these variables for this program's package, not for the package to be
    // built.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            command.env_remove(name);
        }
    }
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("could not run {}", command.get_program().display()))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_string_lossy).collect();
        bail!("{} {} failed", command.get_program().display(), arguments.join(" "));
    }
    Ok(())
}
