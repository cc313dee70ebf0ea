//! How the process ends: asked by a signal it finishes what is in flight, asked twice it ends at once, and a loop that
//! ends unasked takes the whole process with it rather than leave it half alive.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// How long work in flight may take after a signal.
const DRAIN_DEADLINE: Duration = Duration::from_secs(15);

/// A token that the first SIGTERM or SIGINT cancels. The second one ends the process at once, as do 15 s.
///
/// # Errors
///
/// When signals cannot be received.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let cancelled = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: finishing what is in flight");
        cancelled.cancel();
        // Whatever is open then is rolled back by the database, and delivered again.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(DRAIN_DEADLINE) => {
                error!("still busy {} s after the signal: stopping", DRAIN_DEADLINE.as_secs());
                std::process::exit(1);
            }
        }
        warn!("a second signal: stopping at once");
        std::process::exit(0);
    });
    Ok(token)
}
