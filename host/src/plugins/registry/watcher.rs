//! Watches the plugin directory. Events of the file system are only hints to look; a look every few seconds finds what
//! they do not tell of: bind mounts, network file systems, swapped symbolic links, events that were lost.

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

/// How often the directory is looked at without a hint.
const RESCAN: Duration = Duration::from_secs(5);
/// Between the two looks that must see the same. Were it too short, half a file would be read and refused, and read again
/// when it has changed.
const SETTLE: Duration = Duration::from_millis(20);

/// What has been watched, as its device and number: a directory that was made anew is another one.
type Inode = (u64, u64);

/// Keeps `registry` up to date until `shutdown`.
pub async fn watch(registry: Arc<Registry>, shutdown: CancellationToken) {
    let mut watching: Option<(Inode, RecommendedWatcher)> = None;
    let mut told = false;
    loop {
        let inode = inode(registry.dir());
        if inode != watching.as_ref().map(|(inode, _)| *inode) {
            // Before the look: what changes between the two is seen by one of them.
            watching = match inode
                .map(|inode| start(registry.dir(), &registry.feedback_wake).map(|watcher| (inode, watcher)))
            {
                Some(Ok(watching)) => Some(watching),
                Some(Err(error)) if !told => {
                    told = true;
                    warn!(
                        %error,
                        "no events from {}: new plugins are found within {} s instead of at once (fs.inotify.max_user_watches or max_user_instances may be used up)",
                        registry.dir().display(),
                        RESCAN.as_secs()
                    );
                    None
                }
                _ => None,
            };
        }
        let changing = registry.refresh().await;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            // While something changes, more hints tell nothing new.
            _ = registry.feedback_wake.woken(), if !changing => {}
            () = tokio::time::sleep(if changing { SETTLE } else { RESCAN }) => {}
        }
    }
}

/// Whether events can be had from `dir`. Without them [`watch`] finds changes by looking.
///
/// # Errors
///
/// When they cannot.
pub fn try_watch(dir: &Path) -> notify::Result<()> {
    start(dir, &Arc::new(Wake::default())).map(drop)
}

fn inode(dir: &Path) -> Option<Inode> {
    std::fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn start(dir: &Path, feedback_wake: &Arc<Wake>) -> notify::Result<RecommendedWatcher> {
    let feedback_wake = Arc::clone(feedback_wake);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is an event as well, and must not be a reason to read.
        let ours = event.is_ok_and(
            |event| matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write)),
        );
        if !ours {
            feedback_wake.wake(Reason::Plugins);
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
