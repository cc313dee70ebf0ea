//! Intakes: take messages that publishers publish to an exchange, and write them as rows, so that any service that can publish can
//! schedule.
//!
//! ```text
//!   publisher ──▶ FROM ──▶ queue tidings.intake.FROM ──▶ request.rs: what it asks for ──▶ batch.rs: in which order ──▶ rows
//!                                                              │ it cannot be
//!                                                              └──▶ tidings.parking
//! ```
//!
//! Must never acknowledge a message before its row is committed, or before RabbitMQ has confirmed its copy in `tidings.parking`.
//! So a publisher's confirm means: it will come. Must never let one message stop the next.
//!
//! To change this folder, know that:
//!
//! - A batch is what has arrived: while one is written, the next one gathers. No message waits for others.
//! - If PostgreSQL refuses a batch because of its values, its halves are tried, until the message that is the cause stands alone.
//! - After any other error the connection is closed. What was not acknowledged is in its queue again, and comes again, marked as
//!   redelivered; its row is then found by its id.
//! - Each intake has a connection of its own, so that what goes wrong with one concerns no other.

mod batch;
pub mod request;
pub mod status;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tidings_core::backoff::RECONNECT;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, IntakeConsumer, Received, Verdict, parked_copy};
use crate::model::backoff::jittered;
use crate::model::clock::DatabaseClock;
use crate::model::error_chain::error_chain;
use crate::model::intake::{Request, Taken};
use crate::store::{Store, StoreError};
use crate::telemetry;
use request::Rules;
use status::IntakeStatus;

/// So many messages are written in one transaction.
const BATCH: usize = 500;
/// How long to wait while RabbitMQ takes no messages.
const RETRY: Duration = Duration::from_millis(100);
/// How old the reading of the database's clock may be. It only decides what is more than ten years ahead.
const MAX_CLOCK_AGE: Duration = Duration::from_hours(1);

/// The task of one intake.
#[derive(Debug)]
pub struct IntakeTask {
    /// The database in which rows are written.
    pub store: Store,
    /// RabbitMQ.
    pub broker: Arc<Broker>,
    /// What it takes.
    pub rules: Arc<Rules>,
    /// How many messages a second it takes at most; `None` = as many as come.
    pub rate: Option<u32>,
    /// The intake, and what it does.
    pub status: Arc<IntakeStatus>,
}

/// Why an intake has to begin again.
#[derive(Debug, thiserror::Error)]
enum IntakeError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("RabbitMQ did not confirm the copy of a refused message")]
    NotParked,
}

impl IntakeTask {
    /// Runs until `shutdown`. A batch that has begun is written and acknowledged.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut failures = 0;
        while !shutdown.is_cancelled() {
            let pause = if self.broker.is_open() {
                match self.take(&shutdown, &mut failures).await {
                    Ok(()) => return,
                    Err(error) => {
                        self.report(&error);
                        let pause = jittered(&RECONNECT, failures);
                        failures = failures.saturating_add(1);
                        pause
                    }
                }
            } else {
                RETRY
            };
            shutdown.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    fn report(&self, error: &IntakeError) {
        if self.status.set_problem(Some(error_chain(error))) {
            warn!(
                intake = self.status.intake().from,
                error = error as &dyn std::error::Error,
                "an intake takes no messages, trying again; they wait in its queue"
            );
        }
    }

    /// Takes messages until `shutdown`, or until an error.
    async fn take(&self, shutdown: &CancellationToken, failures: &mut u32) -> Result<(), IntakeError> {
        // While the database is away, the messages stay where they are.
        let mut clock = self.store.clock().await?;
        let queue = self.status.intake().queue(self.broker.exchange());
        let (connection, mut consumer) = self.broker.open_intake(self.status.intake()).await?;
        if self.status.set_problem(None) {
            info!(intake = self.status.intake().from, "an intake takes messages again");
        }
        let limit = self.rate.map_or(BATCH, |rate| BATCH.min(rate as usize)).max(1);
        let ended = loop {
            let batch = tokio::select! {
                biased;
                () = shutdown.cancelled() => break Ok(()),
                batch = consumer.next(limit) => batch,
            };
            let begun = Instant::now();
            let taken = async {
                let batch = batch?;
                if clock.age() > MAX_CLOCK_AGE {
                    clock = self.store.clock().await?;
                }
                let count = batch.len();
                self.handle(&consumer, batch, &queue, &clock).await.map(|()| count)
            };
            match taken.await {
                Err(error) => break Err(error),
                Ok(count) => {
                    *failures = 0;
                    if let Some(rate) = self.rate {
                        let pause = begun
                            + Duration::from_secs_f64(
                                f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / f64::from(rate),
                            );
                        shutdown.run_until_cancelled(tokio::time::sleep_until(pause)).await;
                    }
                }
            }
        };
        drop(consumer);
        connection.close().await;
        ended
    }

    /// Writes the rows of a batch, parks what cannot be a row, and acknowledges all.
    async fn handle(
        &self,
        consumer: &IntakeConsumer,
        batch: Vec<Received>,
        queue: &str,
        clock: &DatabaseClock,
    ) -> Result<(), IntakeError> {
        let now_ms = clock.now_ms();
        let (mut requests, mut places, mut refused) = (Vec::with_capacity(batch.len()), Vec::new(), Vec::new());
        for (place, received) in batch.iter().enumerate() {
            match request::read(&received.message, self.status.intake(), queue, &self.rules, now_ms) {
                Ok(request) => {
                    requests.push(request);
                    places.push(place);
                }
                Err(reason) => refused.push((place, reason)),
            }
        }
        let age = batch.last().map_or(Duration::ZERO, |last| last.at.elapsed());
        let (taken, failure) = self.write(&requests, age).await;
        drop(requests);
        self.status.count(taken.iter().filter(|taken| !matches!(taken, Taken::Refused(_))).count());
        telemetry::count_intake(&self.status.intake().from, &taken);
        for (place, taken) in places.iter().zip(&taken) {
            if let Taken::Refused(reason) = taken {
                refused.push((*place, reason.clone()));
            }
        }
        if let Some(error) = failure {
            // The rows before it are committed. Their messages must not come again.
            let tags: Vec<u64> = (places.iter().zip(&taken))
                .filter(|(_, taken)| !matches!(taken, Taken::Refused(_)))
                .map(|(place, _)| batch[*place].tag())
                .collect();
            consumer.acknowledge_each(&tags).await?;
            return Err(error.into());
        }
        if refused.is_empty() {
            let last = batch.last().map_or(0, Received::tag);
            return Ok(consumer.acknowledge_all(last).await?);
        }
        let refused_places: HashSet<usize> = refused.iter().map(|(place, _)| *place).collect();
        let (refused_tags, other_tags): (Vec<_>, Vec<_>) = batch
            .iter()
            .enumerate()
            .map(|(place, received)| (place, received.tag()))
            .partition(|(place, _)| refused_places.contains(place));
        let tags = |tags: Vec<(usize, u64)>| tags.into_iter().map(|(_, tag)| tag).collect::<Vec<_>>();
        // Before the others are parked, which may fail while RabbitMQ takes no messages.
        consumer.acknowledge_each(&tags(other_tags)).await?;
        self.park(batch, refused, queue).await?;
        Ok(consumer.acknowledge_each(&tags(refused_tags)).await?)
    }

    /// Carries out requests. Returns what became of them and, if the database could not go on, its error: then only of those
    /// before it.
    async fn write(&self, requests: &[Request], age: Duration) -> (Vec<Taken>, Option<StoreError>) {
        let mut taken = Vec::with_capacity(requests.len());
        let mut parts = vec![requests];
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match self.store.take_in(&batch::steps(part), part.len(), age).await {
                Ok(of_part) => taken.extend(of_part),
                Err(error) => match (error.fault_of_values(), part) {
                    (None, _) => return (taken, Some(error)),
                    (Some(why), [_]) => taken.push(Taken::Refused(why.to_owned())),
                    (Some(_), part) => {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    }
                },
            }
        }
        (taken, None)
    }

    /// Publishes refused messages to `tidings.parking`, with the reason.
    async fn park(&self, batch: Vec<Received>, refused: Vec<(usize, String)>, queue: &str) -> Result<(), IntakeError> {
        let mut batch: Vec<Option<Received>> = batch.into_iter().map(Some).collect();
        for (place, reason) in refused {
            let Some(received) = batch[place].take() else { continue };
            debug!(intake = self.status.intake().from, reason, "refused a message");
            if self.status.refuse(&reason) {
                warn!(intake = self.status.intake().from, reason, "refused a message, which is parked with the reason");
            }
            telemetry::count_refused_by_intake(&self.status.intake().from);
            // One at a time: bodies may be large.
            let message = parked_copy(
                self.broker.exchange(),
                Uuid::from_u128(fastrand::u128(..)),
                &received.message,
                queue,
                &reason,
            );
            if !matches!(self.broker.publish(vec![message]).await[..], [Verdict::Confirmed(_)]) {
                return Err(IntakeError::NotParked);
            }
        }
        Ok(())
    }
}
