//! The basis of the demo, the tests and the measurements: private PostgreSQL and RabbitMQ servers, builds of the daemon
//! and the plugins, the daemon as a process, and a consumer. It never mocks a server. Keep it small, because the first
//! `cargo demo` compiles all of it.

pub mod build;
pub mod cluster;
pub mod consumer;
pub mod containers;
pub mod daemon;
pub mod image;
pub mod place;
pub mod processes;
pub mod servers;
pub mod setup;
pub mod standby;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// How long a test waits for an event before it fails. Much longer than any event takes, so that only a failing test
/// waits this long.
pub const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The top directory of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    repository.canonicalize().expect("the repository is there")
}

/// The directory that cargo builds into.
///
/// # Panics
///
/// If this program was not built by cargo.
#[must_use]
pub fn target() -> PathBuf {
    profile_dir().parent().expect("a profile's directory lies in the target directory").to_owned()
}

/// The directory of the cargo profile that built this program: `target/debug` or `target/release`.
#[must_use]
pub fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a program knows where it is");
    let dir = exe.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") {
        dir.parent().expect("deps lies in the profile's directory").to_owned()
    } else {
        dir.to_owned()
    }
}

/// Calls `check` every 10 ms until it returns a value, and returns that value.
///
/// # Panics
///
/// When `check` has returned no value within [`EVENT_TIMEOUT`].
pub async fn eventually<T>(event: &str, check: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(EVENT_TIMEOUT, event, check).await
}

/// Calls `check` every 10 ms until it returns a value, for at most `timeout`.
///
/// # Panics
///
/// When `check` has returned no value within `timeout`.
pub async fn eventually_within<T>(timeout: Duration, event: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + timeout;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "{event} did not happen within {} s", timeout.as_secs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A shell command line that runs `command` with the same program, arguments and environment.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_string_lossy().replace('\'', r"'\''"));
    let mut words = vec!["env".to_owned()];
    // `env` takes the options that unset variables before those that set them.
    words.extend(
        command.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| format!("-u {}", quoted(name))),
    );
    words.extend(command.get_envs().filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?)))));
    words.push(quoted(command.get_program()));
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}
