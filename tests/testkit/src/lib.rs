//! What the demo, the tests and the measurements stand on: private servers, the built daemon and plugins, the real daemon as
//! a process, and a consumer. Never a mock. Kept small, since the first `cargo demo` compiles all of it.

pub mod build;
pub mod consumer;
pub mod containers;
pub mod daemon;
pub mod image;
pub mod place;
pub mod servers;
pub mod setup;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// How long anything that must happen may take. Far more than it takes: a test that waits for it fails in the end, and
/// one that passes has not waited.
pub const PATIENCE: Duration = Duration::from_secs(30);

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

/// Where cargo put this program's profile: `target/debug` or `target/release`.
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

/// Waits until `check` answers with a value, asking every few milliseconds.
///
/// # Panics
///
/// When it has not within [`PATIENCE`].
pub async fn eventually<T>(what: &str, check: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, check).await
}

/// The same within another time, for what is slow.
///
/// # Panics
///
/// As [`eventually`].
pub async fn eventually_within<T>(patience: Duration, what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what} did not happen within {} s", patience.as_secs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a shell must be told to do what `command` would.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_string_lossy().replace('\'', r"'\''"));
    let mut words = vec!["env".to_owned()];
    // It takes what to forget before what to set.
    words.extend(
        command.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| format!("-u {}", quoted(name))),
    );
    words.extend(command.get_envs().filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?)))));
    words.push(quoted(command.get_program()));
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}
