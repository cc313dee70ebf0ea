//! What signals do. Asked to end, the process finishes what is in flight; asked twice it ends at once. At SIGHUP the daemon
//! looks again at what it was given, and goes on. No signal that another process sends by habit ends the daemon halfway.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::broker::{Broker, BrokerError};
use crate::plugins::Registry;
use crate::store::Store;

/// How long work in flight may take after a signal.
const DRAIN_DEADLINE: Duration = Duration::from_secs(15);

/// What arrives of some signals.
#[derive(Debug)]
pub struct Signals(mpsc::Receiver<SignalKind>);

impl Signals {
    /// From now on these signals are received, and none of them ends the process.
    ///
    /// # Errors
    ///
    /// When they cannot be received.
    fn of(kinds: &[SignalKind]) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(1);
        for &kind in kinds {
            let (mut arrivals, sender) = (signal(kind)?, sender.clone());
            tokio::spawn(async move { while arrivals.recv().await.is_some() && sender.send(kind).await.is_ok() {} });
        }
        Ok(Self(receiver))
    }

    /// SIGHUP, with which an operator says that files have changed; and SIGUSR1 and SIGUSR2, which mean nothing to us but
    /// end a process that does not expect them.
    ///
    /// # Errors
    ///
    /// When they cannot be received.
    pub fn to_go_on() -> std::io::Result<Self> {
        Self::of(&[SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::user_defined2()])
    }

    async fn next(&mut self) -> SignalKind {
        match self.0.recv().await {
            Some(kind) => kind,
            // The runtime ends.
            None => std::future::pending().await,
        }
    }
}

/// A token that the first SIGTERM, SIGINT or SIGQUIT cancels, for the daemon. The second one ends the process at once, as do
/// 15 s.
///
/// # Errors
///
/// When signals cannot be received.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    shutdown_on(&[SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()])
}

/// The same for a command, which SIGHUP ends as well: its terminal is gone.
///
/// # Errors
///
/// When signals cannot be received.
pub fn shutdown_on_signal_or_hangup() -> std::io::Result<CancellationToken> {
    shutdown_on(&[SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::hangup()])
}

fn shutdown_on(kinds: &[SignalKind]) -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut signals = Signals::of(kinds)?;
    let cancelled = token.clone();
    tokio::spawn(async move {
        signals.next().await;
        info!("stopping: finishing what is in flight");
        cancelled.cancel();
        // Whatever is open then is rolled back by the database, and delivered again.
        tokio::select! {
            _ = signals.next() => {}
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

/// At each SIGHUP looks at the plugin directory, and whether both servers take a new connection with the TLS files as they
/// are now: every connection reads them when it is made, and those that are there go on.
pub async fn look_again(
    mut signals: Signals,
    plugins: Arc<Registry>,
    store: Store,
    broker: Arc<Broker>,
    shutdown: CancellationToken,
) {
    while let Some(signal) = shutdown.run_until_cancelled(signals.next()).await {
        if signal != SignalKind::hangup() {
            info!("a signal that means nothing to the daemon, which goes on");
            continue;
        }
        info!("SIGHUP: looking again at the plugin directory and the TLS files");
        plugins.look_again();
        let probes = async {
            let visited = async {
                broker.visit().await?.close().await;
                Ok::<(), BrokerError>(())
            };
            let (database, broker) = tokio::join!(store.probe(), visited);
            [database.err().map(anyhow::Error::from), broker.err().map(anyhow::Error::from)]
        };
        let Some(failed) = shutdown.run_until_cancelled(probes).await else { return };
        if failed.iter().all(Option::is_none) {
            info!("PostgreSQL and RabbitMQ take new connections with the TLS files as they are now");
        }
        for error in failed.into_iter().flatten() {
            warn!(
                error = &*error as &dyn std::error::Error,
                "no new connection could be made after SIGHUP; those that are there go on"
            );
        }
    }
}
