//! The task that makes occurrences: it puts rows into `tidings.schedules` shortly before they are due. A look of the scheduler
//! at the queue tells when that is next, so that this task sends no statement of its own until then.
//!
//! Every daemon runs it. A daemon locks the recurrences that it looks at, and skips those that another has locked; the
//! transaction that makes occurrences moves `next_at` on. So no instant is made twice, also if daemons are killed.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tidings_core::backoff::DATABASE;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::broker::Broker;
use crate::model::backoff::jittered;
use crate::model::recurrence::{DueRecurrence, MadeRecurrence, Then};
use crate::recurrences::instants::Instants;
use crate::recurrences::plan::State;
use crate::recurrences::rule::{Rule, RuleError};
use crate::recurrences::zone::{self, Zone};
use crate::store::{Making, Store, StoreError};
use crate::telemetry;

/// So many recurrences are looked at in one transaction.
const RECURRENCES: i64 = 100;
/// So many occurrences of one recurrence are made in one transaction. Missed ones are all due at once, and a claim's worth of
/// them delays no other row.
const ROOM: usize = 200;
/// For so long instants are computed in one transaction. A rule that never comes takes many milliseconds.
const COMPUTING: Duration = Duration::from_secs(1);

/// The task that makes occurrences.
#[derive(Debug)]
pub struct Maker {
    /// The database with the recurrences.
    pub store: Store,
    /// While it takes no messages, this daemon makes nothing. Each recurrence says what becomes of the instants missed meanwhile.
    pub broker: Arc<Broker>,
    /// When the next occurrences are to be made, by the last look at the queue.
    pub make_at: watch::Receiver<Option<Instant>>,
}

impl Maker {
    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        // Instants that were computed by an older release of the time zone database are computed anew.
        let mut failures = 0;
        loop {
            match self.store.compute_again(zone::release()).await {
                Ok(0) => break,
                Ok(recurrences) => {
                    info!(recurrences, release = zone::release(), "the next instants of recurrences are computed anew");
                    break;
                }
                Err(error) => report(&error),
            }
            if shutdown.run_until_cancelled(tokio::time::sleep(jittered(&DATABASE, failures))).await.is_none() {
                return;
            }
            failures = failures.saturating_add(1);
        }
        failures = 0;
        loop {
            let make_at = *self.make_at.borrow_and_update();
            let wait = async {
                match make_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                changed = self.make_at.changed() => {
                    // The scheduler has ended.
                    if changed.is_err() {
                        return;
                    }
                    continue;
                }
                () = wait => {}
            }
            // PostgreSQL rolls back what is cut off here, and another daemon makes it.
            let made = async { if self.broker.is_open() { self.make_all().await } else { Ok(()) } };
            let Some(made) = shutdown.run_until_cancelled(made).await else { return };
            if let Err(error) = made {
                report(&error);
                if shutdown.run_until_cancelled(tokio::time::sleep(jittered(&DATABASE, failures))).await.is_none() {
                    return;
                }
                failures = failures.saturating_add(1);
                continue;
            }
            failures = 0;
            // A later look tells when to do so again.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                changed = self.make_at.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Makes what is to be made now.
    async fn make_all(&self) -> Result<(), StoreError> {
        loop {
            let looked_at = match self.make(RECURRENCES).await {
                Ok(looked_at) => looked_at,
                // One of them may be the cause: then the others are made without it.
                Err(error) if error.refusal().is_some() => return self.make_each().await,
                Err(error) => return Err(error),
            };
            if looked_at < RECURRENCES {
                return Ok(());
            }
        }
    }

    /// Makes what is to be made now, one recurrence at a time. What PostgreSQL refuses becomes its problem.
    async fn make_each(&self) -> Result<(), StoreError> {
        loop {
            let Some(making) = self.store.begin_making(1).await? else { return Ok(()) };
            let name = making.due.first().map(|due| due.name.clone()).unwrap_or_default();
            if let Err(error) = self.finish(making).await {
                let Some(refusal) = error.refusal() else { return Err(error) };
                warn!(recurrence = name, error = refusal, "PostgreSQL refuses the occurrences of a recurrence");
                self.store.note_refusal(&name, &format!("PostgreSQL refuses its occurrences: {refusal}")).await?;
            }
        }
    }

    /// Makes the occurrences of so many recurrences at most. Returns at how many it has looked.
    async fn make(&self, limit: i64) -> Result<i64, StoreError> {
        let Some(making) = self.store.begin_making(limit).await? else { return Ok(0) };
        let looked_at = i64::try_from(making.due.len()).unwrap_or(limit);
        self.finish(making).await?;
        Ok(looked_at)
    }

    async fn finish(&self, mut making: Making) -> Result<(), StoreError> {
        let (due, now) = (std::mem::take(&mut making.due), to_timestamp(making.now));
        for recurrence in &due {
            telemetry::record_making_lag(recurrence.lag);
        }
        // On another thread, since no row would be delivered meanwhile. What there is no time for is left for another
        // transaction.
        let planned = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let in_time = due.iter().take_while(|_| begun.elapsed() < COMPUTING);
            in_time.map(|recurrence| plan(recurrence, now)).collect::<Vec<MadeRecurrence>>()
        });
        let made = planned.await.expect("a panic is caught for each recurrence");
        let occurrences = making.commit(&made, zone::release()).await?;
        telemetry::count_occurrences(occurrences);
        for MadeRecurrence { name, instants, next_at, then, .. } in &made {
            match then {
                Then::Problem(problem) => {
                    warn!(recurrence = name, problem, "no occurrence of a recurrence can be made");
                }
                Then::Ended => info!(recurrence = name, "a recurrence has ended"),
                Then::Continue | Then::Backlog => {
                    debug!(recurrence = name, made = instants.len(), ?next_at, "made occurrences");
                }
            }
        }
        Ok(())
    }
}

/// What becomes of one recurrence at this moment.
fn plan(due: &DueRecurrence, now: Timestamp) -> MadeRecurrence {
    let problem = match std::panic::catch_unwind(|| try_plan(due, now)) {
        Ok(Ok(made)) => return made,
        Ok(Err(problem)) => problem.to_string(),
        Err(_) => "its instants cannot be computed, by a fault of this tidings: please report it".to_owned(),
    };
    MadeRecurrence {
        name: due.name.clone(),
        instants: Vec::new(),
        next_at: None,
        passed_at: due.passed_at,
        then: Then::Problem(problem),
    }
}

fn try_plan(due: &DueRecurrence, now: Timestamp) -> Result<MadeRecurrence, RuleError> {
    let instants = Instants::new(
        Rule::parse(&due.rule)?,
        Zone::named(&due.time_zone)?,
        to_timestamp(due.anchor),
        due.starts_at.map(to_timestamp),
    );
    let state = State {
        next_at: due.next_at.map(to_timestamp),
        passed_at: to_timestamp(due.passed_at),
        ends_at: due.ends_at.map(to_timestamp),
        left: due.left,
        catch_up: due.catch_up,
        within: due.catch_up_within.map(|within| SignedDuration::try_from(within).unwrap_or(SignedDuration::MAX)),
        offset: SignedDuration::try_from(due.offset).unwrap_or(SignedDuration::ZERO),
    };
    let plan = state.plan(&instants, now, ROOM)?;
    Ok(MadeRecurrence {
        name: due.name.clone(),
        instants: plan.instants.into_iter().map(to_time).collect(),
        next_at: plan.next_at.map(to_time),
        passed_at: to_time(plan.passed_at),
        then: plan.then,
    })
}

/// A time of the database; its year is between 1970 and 9999.
#[must_use]
pub fn to_timestamp(at: OffsetDateTime) -> Timestamp {
    Timestamp::from_nanosecond(at.unix_timestamp_nanos()).unwrap_or(Timestamp::MAX)
}

/// A time for the database.
#[must_use]
pub fn to_time(at: Timestamp) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(at.as_nanosecond()).expect("the year is between -9999 and 9999")
}

fn report(error: &StoreError) {
    warn!(error = error as &dyn std::error::Error, "could not make occurrences, trying again");
}
