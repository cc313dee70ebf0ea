//! Watches the plugin directory, and has the registry reload files that change. File events are only hints to look. A
//! look every 5 s finds the changes that cause no event: in bind mounts and network file systems, by swapped symbolic
//! links, or because an event was lost.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tidings_core::reason::Reason;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::model::wake::Wake;
use crate::plugins::registry::Registry;

/// How long the watcher waits for a hint before it looks without one.
const RESCAN_INTERVAL: Duration = Duration::from_secs(5);
/// How long the watcher waits between the two looks that must see the same. If this were too short, a half-written file
/// would be read and refused, and read again after it has changed.
const SETTLE_DELAY: Duration = Duration::from_millis(20);

/// A directory's device and inode number. A directory that was removed and created again has another one, and must be
/// watched anew.
type DirectoryId = (u64, u64);

/// Keeps `registry` up to date until `shutdown`.
pub async fn watch(registry: Arc<Registry>, shutdown: CancellationToken) {
    let mut watching: Option<(DirectoryId, RecommendedWatcher)> = None;
    let mut has_warned = false;
    loop {
        let directory_id = directory_id(registry.dir());
        if directory_id != watching.as_ref().map(|(directory_id, _)| *directory_id) {
            // The watch begins before the look, so that a change between the two is seen by one of them.
            watching = match directory_id.map(|directory_id| {
                start_watcher(registry.dir(), &registry.feedback_wake).map(|watcher| (directory_id, watcher))
            }) {
                Some(Ok(watching)) => Some(watching),
                Some(Err(error)) if !has_warned => {
                    has_warned = true;
                    warn!(
                        %error,
                        "cannot watch {} for changes: new plugins are found within {} s instead of at once (fs.inotify.max_user_watches or max_user_instances may be used up)",
                        registry.dir().display(),
                        RESCAN_INTERVAL.as_secs()
                    );
                    None
                }
                _ => None,
            };
        }
        let is_changing = registry.refresh().await;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            // While a file is changing, the next look comes soon, and a hint must not bring it any sooner.
            _ = registry.feedback_wake.woken(), if !is_changing => {}
            () = tokio::time::sleep(if is_changing { SETTLE_DELAY } else { RESCAN_INTERVAL }) => {}
        }
    }
}

/// Checks that file events can be received for `dir`. Without events, [`watch`] finds changes only by looking.
///
/// # Errors
///
/// When `dir` cannot be watched.
pub fn try_watch(dir: &Path) -> notify::Result<()> {
    start_watcher(dir, &Arc::new(Wake::default())).map(drop)
}

fn directory_id(dir: &Path) -> Option<DirectoryId> {
    std::fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn start_watcher(dir: &Path, feedback_wake: &Arc<Wake>) -> notify::Result<RecommendedWatcher> {
    let feedback_wake = Arc::clone(feedback_wake);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // The daemon's own reads are events as well, and must not cause another look.
        let is_read = event.is_ok_and(
            |event| matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write)),
        );
        if !is_read {
            feedback_wake.wake(Reason::Plugins);
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
