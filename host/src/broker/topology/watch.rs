//! Repairs the daemon's topology every few seconds, beside the loops, and reports to the daemon's health what is
//! missing, what was lost, and which policies lose messages.
//!
//! Must never delay the scheduler or a pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::{Broker, Management};
use crate::model::health::Health;

/// How often the topology is repaired.
const REPAIR_INTERVAL: Duration = Duration::from_secs(5);
/// How often the management API is asked about policies, and how often a trouble that lasts is logged.
const POLICY_INTERVAL: Duration = Duration::from_mins(1);

/// How long the management API may take to say whether a queue is bound.
const BINDING_DEADLINE: Duration = Duration::from_secs(2);

/// The task that repairs the topology.
#[expect(missing_debug_implementations, reason = "the management API has none")]
pub struct TopologyWatch {
    /// RabbitMQ.
    pub broker: Arc<Broker>,
    /// RabbitMQ's management API, for what AMQP does not tell; `None` = it is not configured.
    pub management: Option<Management>,
    /// Where troubles and notes are reported.
    pub health: Arc<Health>,
}

/// What the watch remembers from one repair to the next.
struct WatchState {
    /// The trouble that lasts, and when it was last logged.
    logged: Option<(String, Instant)>,
    /// When `tidings.dead` was last bound.
    last_bound: Instant,
    /// When the policies were last checked; `None` = check them at the next repair.
    policies_checked: Option<Instant>,
}

impl TopologyWatch {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        // The daemon bound the queue when it connected, before this task began.
        let mut state = WatchState { logged: None, last_bound: Instant::now(), policies_checked: None };
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.repair_and_report(&mut state) => {}
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(REPAIR_INTERVAL) => {}
            }
        }
    }

    async fn repair_and_report(&self, state: &mut WatchState) {
        let unbound = self.is_unbound().await;
        let repaired = self.broker.repair_topology().await;
        let mut trouble = repaired.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        if unbound && trouble.is_none() {
            if self.is_unbound().await {
                trouble = Some("messages that consumers reject are lost: the queue for dead letters is not bound, and the daemon's user may not bind it; `tidings topology` prints the binding".into());
            } else {
                self.broker.record_lost_binding(state.last_bound.elapsed()).await;
            }
        }
        if trouble.is_none() {
            state.last_bound = Instant::now();
        }
        state.log(trouble.as_deref());
        self.health.trouble("topology", trouble);
        let losses = self.broker.recent_losses().await;
        self.health.note("losses", (!losses.is_empty()).then(|| losses.join("; ")));
        let unbound = self.broker.unbound_intakes().await;
        self.health.note("unbound intakes", (!unbound.is_empty()).then(|| unbound.join("; ")));
        if state.policies_checked.is_none_or(|at| at.elapsed() >= POLICY_INTERVAL) {
            let (complaints, complete) = self.queue_complaints().await;
            state.policies_checked = complete.then(Instant::now);
            for complaint in &complaints {
                warn!("{complaint}");
            }
            self.health.note("queues", (!complaints.is_empty()).then(|| complaints.join("; ")));
        }
    }

    /// Whether the management API says that `tidings.dead` is not bound; `false` without an answer.
    async fn is_unbound(&self) -> bool {
        let Some(management) = &self.management else { return false };
        // A slow management API must not delay the repair.
        let answer = tokio::time::timeout(BINDING_DEADLINE, management.is_bound(&self.broker)).await;
        matches!(answer, Ok(Ok(false)))
    }

    /// What is wrong with the daemon's queues according to the management API, and whether it knows all their policies yet.
    async fn queue_complaints(&self) -> (Vec<String>, bool) {
        let (mut complaints, mut complete) = (Vec::new(), true);
        let Some(management) = &self.management else { return (complaints, complete) };
        for entity in self.broker.own_queues() {
            match management.queue(&self.broker, &entity).await {
                Ok(Some(queue)) => {
                    complaints.extend(self.broker.complaints(&entity, &queue));
                    complete &= queue.has_policies;
                }
                Ok(None) => complete = false,
                Err(error) => return (vec![format!("{:#}", anyhow::Error::from(error))], true),
            }
        }
        (complaints, complete)
    }
}

impl WatchState {
    /// Logs a trouble once and then every minute, and its end.
    fn log(&mut self, trouble: Option<&str>) {
        match (trouble, &self.logged) {
            (Some(trouble), Some((logged, at))) if trouble == logged && at.elapsed() < POLICY_INTERVAL => {}
            (Some(trouble), _) => {
                warn!("{trouble}");
                self.logged = Some((trouble.to_owned(), Instant::now()));
            }
            (None, Some(_)) => {
                info!("the daemon's exchanges and queues in RabbitMQ are in order again");
                self.logged = None;
            }
            (None, None) => {}
        }
    }
}
