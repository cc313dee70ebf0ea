//! The loop: carries out what the [core](tidings_core) decides, and tells it what came of that.
//!
//! Guarantees: a row leaves the queue only in the transaction that locked it, after its message was confirmed or its end
//! decided; while the broker is away nothing is claimed; an error of a server loses nothing and is tried again.

pub mod canary;
pub mod delivery;
pub mod hold;
pub mod listener;
pub mod notification_rate;
pub mod sent_rows;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tidings_core::reason::Reason;
use tidings_core::{Action, Batch, Claimed, Core, End, Environment, Event, Load, Moment, Wanted, Work};
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::broker::Broker;
use crate::model::health::Health;
use crate::model::wake::Wake;
use crate::plugins::Registry;
use crate::store;
use crate::store::{Store, StoreError};
use crate::telemetry::{count_wakes, note_next_due};
use delivery::{Delivered, Delivery};
use hold::hold;
use sent_rows::SentRows;

/// What [`Health::trouble`] is about while PostgreSQL refuses to finish rows.
const FINISHING: &str = "finishing rows";

/// What the scheduler works with.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Scheduler {
    /// Where the rows are.
    pub store: Store,
    /// Where the messages go.
    pub broker: Arc<Broker>,
    /// Reasons to look again.
    pub wake: Arc<Wake>,
    /// What builds the events.
    pub plugins: Arc<Registry>,
    /// The longest time between two looks.
    pub sweep: Duration,
    /// Failures of a plugin after which a row is parked.
    pub max_attempts: u32,
    /// Told of every sign of life.
    pub health: Arc<Health>,
}

/// The loop while it runs, and what runs beside it.
struct Running {
    with: Scheduler,
    began: Instant,
    delivery: Arc<Delivery>,
    /// Seen through when the loop ends.
    deliveries: JoinSet<Event>,
    /// Given up then.
    others: JoinSet<Event>,
}

impl Scheduler {
    /// Runs until `shutdown`, and then until the batches in flight have ended.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut core = Core::new(self.sweep);
        let mut running = Running::new(self);
        loop {
            running.with.health.dispatcher.beat();
            let event = match core.next(running.now(), running.environment()) {
                Action::Look => Some(running.look(core.mark()).await),
                Action::Claim(wanted) => Some(running.claim(wanted).await),
                Action::Hold => running.hold(),
                Action::Release(kinds) => running.release(kinds),
                Action::Sweep => running.sweep(core.mark()),
                Action::Sleep(until, why) => {
                    let sleep = until.saturating_sub(running.now());
                    tokio::select! {
                    biased;
                    () = shutdown.cancelled() => break,
                    Some(Ok(ended)) = running.deliveries.join_next() => Some(ended),
                    Some(Ok(ended)) = running.others.join_next() => Some(ended),
                    reasons = running.with.wake.woken() => Some(Event::Woken(reasons)),
                    // To the tenth of a millisecond, which tokio's timer is not.
                    () = futures_timer::Delay::new(sleep) => Some(Event::Woken(why.into())),
                    }
                }
            };
            if let Some(event) = event {
                count(&event);
                core.handle(running.now(), event);
            }
            running.tell(&core);
        }
        running.others.abort_all();
        while running.deliveries.join_next().await.is_some() {}
    }
}

impl Running {
    fn new(with: Scheduler) -> Self {
        let (broker, max_attempts) = (Arc::clone(&with.broker), with.max_attempts);
        let delivery = Arc::new(Delivery { broker, max_attempts, sent_rows: SentRows::default() });
        Self { with, began: Instant::now(), delivery, deliveries: JoinSet::new(), others: JoinSet::new() }
    }

    fn now(&self) -> Moment {
        self.began.elapsed()
    }

    fn moment(&self, at: Instant) -> Moment {
        at.saturating_duration_since(self.began)
    }

    fn environment(&self) -> Environment {
        let Scheduler { store, broker, plugins, .. } = &self.with;
        Environment {
            broker_open: broker.is_open(),
            connections: store.connections_for_claims(),
            doubt: store.last_doubt(),
            knows_kinds: plugins.is_complete(),
        }
    }

    async fn look(&self, mark: Option<OffsetDateTime>) -> Event {
        let asked_at = self.now();
        match self.with.store.look(self.with.plugins.current().kinds(), mark).await {
            Ok(look) => {
                note_next_due(look.outlook.next_in);
                if !look.outlook.due {
                    // Nothing waits that could show whether it would be taken now.
                    self.with.broker.nothing_waits();
                }
                Event::Looked(asked_at, look)
            }
            Err(error) => failed(Work::Asking, &error),
        }
    }

    async fn claim(&mut self, Wanted { turn, limit, since, no_large, not_before, careful }: Wanted) -> Event {
        let plugins = self.with.plugins.current();
        let wanted = store::Wanted { limit, since, no_large };
        let claimed = match self.with.store.claim(plugins.kinds(), wanted, self.began + not_before).await {
            Ok(claimed) => claimed,
            Err(error) => return failed(Work::Asking, &error),
        };
        let store::Claimed { claim, outlook, behind, at, asked_at, begin } = claimed;
        let rows = claim.as_ref().map(|claim| Batch { xid: claim.xid, large: claim.large });
        if let Some(claim) = claim {
            let load = Load { turn, large: claim.large };
            let delivery = Arc::clone(&self.delivery);
            let delivered = async move {
                let delivered = delivery.deliver(claim, &plugins, careful).await;
                Event::DeliveryEnded(load, end(delivered))
            };
            begin_beside(&mut self.deliveries, "a delivery", Event::DeliveryEnded(load, End::Panicked), delivered);
        }
        Event::Claimed(Claimed { turn, asked_at: self.moment(asked_at), begin, at, outlook, behind, rows })
    }

    fn hold(&mut self) -> Option<Event> {
        let (store, plugins) = (self.with.store.clone(), self.with.plugins.current());
        begin_beside(&mut self.others, "holding rows", Event::Failed(Work::Holding), async move {
            match hold(&store, plugins.kinds()).await {
                Ok(held) => Event::Held(held.report()),
                Err(error) => failed(Work::Holding, &error),
            }
        });
        None
    }

    fn release(&mut self, kinds: Vec<String>) -> Option<Event> {
        let (store, wake) = (self.with.store.clone(), Arc::clone(&self.with.wake));
        begin_beside(&mut self.others, "releasing held rows", Event::Failed(Work::Releasing), async move {
            // There may be millions; the first of them are due before the last are released.
            match store.release_held(&kinds, || wake.wake(Reason::Released)).await {
                Ok(released) => {
                    info!(released, "released held rows: a plugin serves them, and their kind is not paused");
                    Event::Released
                }
                Err(error) => failed(Work::Releasing, &error),
            }
        });
        None
    }

    fn sweep(&mut self, mark: Option<OffsetDateTime>) -> Option<Event> {
        let (store, plugins, asked_at) = (self.with.store.clone(), self.with.plugins.current(), self.now());
        begin_beside(&mut self.others, "a sweep", Event::Swept(None), async move {
            match store.sweep(plugins.kinds(), mark).await {
                Ok(look) => Event::Swept(Some((asked_at, look))),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "a sweep failed");
                    Event::Swept(None)
                }
            }
        });
        None
    }

    /// Tells what others want to know.
    fn tell(&self, core: &Core) {
        self.with.store.note_mark(core.mark());
        let sentence =
            core.refusal().map(|why| format!("PostgreSQL refuses to finish rows whose messages RabbitMQ has: {why}"));
        match (self.with.health.trouble(FINISHING, sentence), core.refusal()) {
            (true, Some(why)) => warn!(
                why,
                "PostgreSQL refuses to finish rows whose messages RabbitMQ has; they are not sent again, and tried ever less often"
            ),
            (true, None) => info!("PostgreSQL finishes rows again"),
            (false, _) => {}
        }
    }
}

/// Counts what ended a sleep.
fn count(event: &Event) {
    count_wakes(match event {
        Event::Woken(reasons) => *reasons,
        Event::DeliveryEnded(..) => Reason::Lane.into(),
        Event::Held(_) | Event::Failed(Work::Holding) => Reason::Held.into(),
        Event::Released | Event::Failed(Work::Releasing) => Reason::Released.into(),
        Event::Looked(..) | Event::Claimed(_) | Event::Swept(_) | Event::Failed(Work::Asking) => return,
    });
}

/// Begins work beside the loop, which ends with an event even if it panics.
fn begin_beside(
    set: &mut JoinSet<Event>,
    what: &'static str,
    panicked: Event,
    work: impl Future<Output = Event> + Send + 'static,
) {
    set.spawn(AssertUnwindSafe(work).catch_unwind().map(move |ended| {
        ended.unwrap_or_else(|_| {
            error!("{what} panicked: what it was about stays as it is");
            panicked
        })
    }));
}

fn failed(work: Work, error: &StoreError) -> Event {
    warn!(error = error as &dyn std::error::Error, "the database cannot be used, trying again");
    Event::Failed(work)
}

/// How a delivery ended, and a line for the operator if the database did not see it through.
fn end(ended: Result<Delivered, StoreError>) -> End {
    match ended {
        Ok(Delivered::Settled { some_left, some_stay }) => End::Settled { some_left, some_stay },
        Ok(Delivered::Unsettled) => End::Unsettled,
        Ok(Delivered::Refused { why, sent }) => End::Refused { why, rest: sent },
        Err(error) => {
            if let Some(why) = error.refusal() {
                return End::Refused { why: why.to_owned(), rest: true };
            }
            warn!(error = &error as &dyn std::error::Error, "the database cannot be used, trying again");
            End::Failed
        }
    }
}
