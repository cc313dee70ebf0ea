//! What signals do. At the first SIGTERM, SIGINT or SIGQUIT the process finishes what is in flight, and ends after 15 s
//! at most; at the second it ends at once. At SIGHUP the daemon checks the plugin directory and the TLS files, and goes
//! on. SIGUSR1 and SIGUSR2, which would end a process that does not handle them, are ignored.

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

/// A stream of certain signals.
#[derive(Debug)]
pub struct Signals(mpsc::Receiver<SignalKind>);

impl Signals {
    /// Handles these signals from now on, so that none of them ends the process by itself.
    ///
    /// # Errors
    ///
    /// When the signals cannot be handled.
    fn of(kinds: &[SignalKind]) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(1);
        for &kind in kinds {
            let (mut arrivals, sender) = (signal(kind)?, sender.clone());
            tokio::spawn(async move { while arrivals.recv().await.is_some() && sender.send(kind).await.is_ok() {} });
        }
        Ok(Self(receiver))
    }

    /// SIGHUP, which tells the daemon that files have changed; and SIGUSR1 and SIGUSR2, which have no meaning here but
    /// end a process that does not handle them.
    ///
    /// # Errors
    ///
    /// When the signals cannot be handled.
    pub fn non_fatal() -> std::io::Result<Self> {
        Self::of(&[SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::user_defined2()])
    }

    async fn next(&mut self) -> SignalKind {
        match self.0.recv().await {
            Some(kind) => kind,
            // The runtime is shutting down.
            None => std::future::pending().await,
        }
    }
}

/// Returns a token for the daemon that the first SIGTERM, SIGINT or SIGQUIT cancels. The process is ended at once by
/// the second signal, or 15 s after the first.
///
/// # Errors
///
/// When the signals cannot be handled.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    shutdown_on(&[SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()])
}

/// The same for a command, which SIGHUP ends as well, since its terminal is gone.
///
/// # Errors
///
/// When the signals cannot be handled.
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
        // When the process exits, PostgreSQL rolls back its open transactions, and their rows are delivered again.
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

/// At each SIGHUP checks the plugin directory, and whether both servers accept a new connection with the TLS files as
/// they are now. Every connection reads the files when it is made; existing connections are not affected.
pub async fn check_on_hangup(
    mut signals: Signals,
    plugins: Arc<Registry>,
    store: Store,
    broker: Arc<Broker>,
    shutdown: CancellationToken,
) {
    while let Some(signal) = shutdown.run_until_cancelled(signals.next()).await {
        if signal != SignalKind::hangup() {
            info!("ignored a signal that has no meaning for the daemon");
            continue;
        }
        info!("SIGHUP: looking again at the plugin directory and the TLS files");
        plugins.look_again();
        let probes = async {
            let visit = async {
                broker.visit().await?.close().await;
                Ok::<(), BrokerError>(())
            };
            let (database, broker) = tokio::join!(store.probe(), visit);
            [database.err().map(anyhow::Error::from), broker.err().map(anyhow::Error::from)]
        };
        let Some(results) = shutdown.run_until_cancelled(probes).await else { return };
        if results.iter().all(Option::is_none) {
            info!("PostgreSQL and RabbitMQ take new connections with the TLS files as they are now");
        }
        for error in results.into_iter().flatten() {
            warn!(
                error = &*error as &dyn std::error::Error,
                "no new connection could be made after SIGHUP; those that are there go on"
            );
        }
    }
}
