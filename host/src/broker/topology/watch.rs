//! Looks after what is ours in RabbitMQ, beside the loops: what is gone is declared again within seconds, and whoever asks
//! for the daemon's health hears of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::{Broker, Management, OwnEntity};
use crate::model::health::Health;

/// From one look to the next.
const EVERY: Duration = Duration::from_secs(5);
/// From one question to the management API about policies to the next; what goes on being wrong is logged as often.
const SELDOM: Duration = Duration::from_mins(1);

/// How long the management API may take to say whether a queue is bound.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the keeper works with.
#[expect(missing_debug_implementations, reason = "the management API has none")]
pub struct TopologyWatch {
    /// Where what is ours is.
    pub broker: Arc<Broker>,
    /// What AMQP does not tell, if it may be asked.
    pub management: Option<Management>,
    /// Who is told.
    pub health: Arc<Health>,
}

/// What was found the last times.
#[derive(Default)]
struct Before {
    /// What is logged, and when it was.
    said: Option<(String, Instant)>,
    /// When the queue for dead letters was bound.
    bound: Option<Instant>,
    /// When the management API was asked about the queues.
    queues: Option<Instant>,
}

impl TopologyWatch {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut before = Before::default();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.look(&mut before) => {}
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }

    async fn look(&self, before: &mut Before) {
        let unbound = self.is_unbound().await;
        let kept = self.broker.keep().await;
        let mut trouble = kept.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        if unbound && trouble.is_none() {
            if self.is_unbound().await {
                trouble = Some("what consumers reject is lost: the queue for dead letters is not bound, and our user may not bind it; `tidings topology` prints the binding".into());
            } else if let Some(bound) = before.bound {
                self.broker.was_unbound(bound.elapsed()).await;
            }
        }
        if trouble.is_none() {
            before.bound = Some(Instant::now());
        }
        before.log(trouble.as_deref());
        self.health.trouble("topology", trouble);
        let losses = self.broker.losses().await;
        self.health.note("losses", (!losses.is_empty()).then(|| losses.join("; ")));
        if before.queues.is_none_or(|at| at.elapsed() >= SELDOM) {
            let (complaints, complete) = self.complaints().await;
            before.queues = complete.then(Instant::now);
            for complaint in &complaints {
                warn!("{complaint}");
            }
            self.health.note("queues", (!complaints.is_empty()).then(|| complaints.join("; ")));
        }
    }

    /// Whether the management API says that the queue for dead letters is not bound. Without an answer nobody knows.
    async fn is_unbound(&self) -> bool {
        let Some(management) = &self.management else { return false };
        // What is gone does not wait for who is slow.
        let asked = tokio::time::timeout(PATIENCE, management.is_bound(&self.broker)).await;
        matches!(asked, Ok(Ok(false)))
    }

    /// What the management API says that our queues should not be, and whether it knows all of it yet.
    async fn complaints(&self) -> (Vec<String>, bool) {
        let (mut complaints, mut complete) = (Vec::new(), true);
        let Some(management) = &self.management else { return (complaints, complete) };
        for own in [OwnEntity::Dead, OwnEntity::Parking] {
            match management.queue(&self.broker, own).await {
                Ok(Some(seen)) => {
                    complaints.extend(self.broker.complaints(own, &seen));
                    complete &= seen.complete;
                }
                Ok(None) => complete = false,
                Err(error) => return (vec![format!("{:#}", anyhow::Error::from(error))], true),
            }
        }
        (complaints, complete)
    }
}

impl Before {
    /// Once, and then every minute.
    fn log(&mut self, trouble: Option<&str>) {
        match (trouble, &self.said) {
            (Some(trouble), Some((said, at))) if trouble == said && at.elapsed() < SELDOM => {}
            (Some(trouble), _) => {
                warn!("{trouble}");
                self.said = Some((trouble.to_owned(), Instant::now()));
            }
            (None, Some(_)) => {
                info!("what is ours in RabbitMQ is as it ought to be again");
                self.said = None;
            }
            (None, None) => {}
        }
    }
}
