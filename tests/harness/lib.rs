//! What the tests, the demo and the measurements stand on: private servers, the built plugins, the real daemon, and
//! somebody who consumes. Never a mock.

pub mod amqp_proxy;
pub mod authority;
pub mod bindings;
pub mod browser;
pub mod build;
pub mod collector;
pub mod consumer;
pub mod daemon;
pub mod guests;
pub mod image;
pub mod pages;
pub mod pg_proxy;
mod place;
pub mod pooler;
pub mod proxy;
pub mod raw;
pub mod servers;
pub mod setup;
pub mod world;

use std::path::PathBuf;
use std::time::Duration;

/// How long anything that must happen may take. Far more than it takes: a test that waits for it fails in the end, and
/// one that passes has not waited.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The top directory of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
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
fn profile_dir() -> PathBuf {
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
