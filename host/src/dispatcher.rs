//! The loop: looks at the queue, claims what is due, hands it to a lane that delivers it, and waits for a reason to look
//! again. What is expected to be due, since its time has come, is claimed before anything is looked at.
//!
//! Woken by: a notification, the next row's due time, the end of a pause, the broker coming back, a lane that ended, the
//! sweep. Guarantees: a row leaves the queue only in the transaction that locked it, after its message was confirmed or
//! its end decided; while the broker is away nothing is claimed; an error of a server loses nothing and is tried again.

mod state;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::Broker;
use crate::delivery::{Delivered, Delivery};
use crate::health::Health;
use crate::held::hold;
use crate::plugins::Registry;
use crate::store::{Claimed, Look, Store, StoreError, Wanted};
use crate::sweeps::Swept;
use crate::telemetry::{count_wakes, note_next_due};
use crate::turns::{Came, Load, Turn};
use crate::unfinished::Unfinished;
use crate::wake::{HEAD_START, Outlook, Reason, Reasons, Wake, wait};
use state::State;

/// While rows are claimed again and again, looks are at least this far apart.
const LOOKS_APART: Duration = Duration::from_millis(50);
/// A row that PostgreSQL refuses to finish is tried again earlier than this. If none is due for so long, none is left.
const REFUSED_ARE_GONE: Duration = Duration::from_mins(1);
/// What [`Health::trouble`] is about while PostgreSQL refuses to finish rows.
const FINISHING: &str = "finishing rows";

/// What the dispatcher works with.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Dispatcher {
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

/// What became of some claims.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claims {
    /// Rows are on their way.
    Began,
    /// There was nothing to claim.
    Nothing,
    /// The next row is due in a moment, and a look would be in its way.
    TooEarly,
}

impl Dispatcher {
    /// Runs until `shutdown`, and then until the batches in flight have ended.
    pub async fn run(self, shutdown: CancellationToken) {
        let delivery = Arc::new(Delivery {
            broker: Arc::clone(&self.broker),
            max_attempts: self.max_attempts,
            unfinished: Unfinished::default(),
        });
        let mut state = State::default();
        loop {
            self.health.dispatcher.beat();
            let (wait, why) = self.look_and_start(&delivery, &mut state).await;
            let (until, head_start) =
                (Instant::now() + wait, if why == Reason::Due { state.head_start.get() } else { Duration::ZERO });
            let reasons = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = state.lanes.join_next() => {
                    self.lane_ended(ended, &mut state);
                    Reason::Lane.into()
                }
                Some(ended) = state.hold.join_next() => {
                    if state.ended("holding rows", ended).is_some_and(|held| held.report()) {
                        state.go_on();
                    }
                    Reason::Held.into()
                }
                Some(ended) = state.release.join_next() => {
                    if let Some(released) = state.ended("releasing held rows", ended) {
                        state.go_on();
                        info!(released, "released held rows: a plugin serves them, and their kind is not paused");
                    }
                    Reason::Released.into()
                }
                Some(Swept(swept)) = state.sweeps.ended() => {
                    self.swept(swept, &mut state);
                    state.swept = true;
                    Reasons::default()
                }
                reasons = self.wake.woken() => {
                    state.go_on();
                    if reasons.iter().any(|reason| reason == Reason::Notification) {
                        state.expected.notified = true;
                        state.expected.due_now(state.expected.notified_of_due);
                    }
                    reasons
                }
                // To the tenth of a millisecond, which tokio's timer is not.
                () = futures_timer::Delay::new(wait.saturating_sub(head_start)) => {
                    state.stuck = false;
                    state.quiet = why == Reason::Sweep;
                    if why == Reason::Due {
                        state.expected.due = Some(until);
                    }
                    why.into()
                }
            };
            count_wakes(reasons);
        }
        state.hold.abort_all();
        state.release.abort_all();
        state.sweeps.stop();
        while state.lanes.join_next().await.is_some() {}
    }

    /// Claims what is due, looks at the queue, and says how long to wait, and why to look then.
    async fn look_and_start(&self, delivery: &Arc<Delivery>, state: &mut State) -> (Duration, Reason) {
        let swept = std::mem::take(&mut state.swept);
        if let Some(left) = state.resting() {
            return (left, Reason::Again);
        }
        // The end of a lane is a wake, and so is the return of the broker.
        if !state.has_free_lane(&self.store) || !self.broker.is_open() {
            return (self.sweep, Reason::Sweep);
        }
        // A quick sweep is a look as well, and hardly later.
        let (quiet, kinds) = (std::mem::take(&mut state.quiet), self.plugins.current());
        if state.sweeps.begin_if_due(&self.store, kinds.kinds(), self.sweep) && quiet {
            return self.wait(state);
        }
        let mut claimed = Claims::Nothing;
        if let Some(at) = state.expected.due.take() {
            claimed = match self.claim_and_start(delivery, state, at).await {
                Ok(claimed) => claimed,
                Err(error) => return (state.failed(&error), Reason::Again),
            };
            let has_looked = state.look.as_ref().is_some_and(|(_, asked_at)| asked_at.elapsed() < LOOKS_APART);
            if has_looked && claimed != Claims::Nothing {
                return self.wait(state);
            }
        }
        // Another look would find the same rows due, and the loop would turn as fast as it can; or none, as the sweep did.
        if state.stuck || swept && claimed == Claims::Nothing {
            return self.wait(state);
        }
        let due = match self.look(state).await {
            Ok(due) => due,
            Err(error) => return (state.failed(&error), Reason::Again),
        };
        if due && claimed != Claims::Began {
            match self.claim_and_start(delivery, state, Instant::now()).await {
                Ok(Claims::Began | Claims::TooEarly) => {}
                Ok(Claims::Nothing) => {
                    state.stuck = true;
                    state.empty_claims = state.empty_claims.saturating_add(1);
                    self.start_holding(state);
                }
                Err(error) => return (state.failed(&error), Reason::Again),
            }
        } else if !due {
            state.failures = 0;
            // Nothing waits that could show whether it would be taken now.
            self.broker.nothing_waits();
            if state.refused.is_some_and(|at| at.elapsed() > REFUSED_ARE_GONE) {
                self.finishes_again(state);
            }
        }
        self.wait(state)
    }

    /// Looks at the queue. Whether rows are due.
    async fn look(&self, state: &mut State) -> Result<bool, StoreError> {
        let asked_at = Instant::now();
        let look = self.store.look(self.plugins.current().kinds()).await?;
        Ok(self.looked(state, look, asked_at))
    }

    /// Takes note of a look. Whether rows are due.
    fn looked(&self, state: &mut State, look: Look, asked_at: Instant) -> bool {
        state.polling.looked(look.promise);
        if !look.held_for_us.is_empty() && state.release.is_empty() {
            // Beside the loop, since there may be millions; the first of them are due before the last are released.
            let (store, wake, kinds) = (self.store.clone(), Arc::clone(&self.wake), look.held_for_us.clone());
            state.release.spawn(async move { store.release_held(&kinds, || wake.wake(Reason::Released)).await });
        }
        let outlook = look.outlook;
        note_next_due(outlook.next_in);
        if std::mem::take(&mut state.expected.notified) {
            state.expected.notified_of_due = outlook.due;
        }
        state.look = Some((look, asked_at));
        state.ahead = Some((outlook, asked_at));
        outlook.due
    }

    /// Takes note of a sweep, unless it failed, which a look will find as well.
    fn swept(&self, swept: Option<(Look, Instant)>, state: &mut State) {
        let Some((look, asked_at)) = swept else { return };
        state.stuck &= look.below.is_none();
        state.expected.due_now(look.outlook.due && !state.stuck);
        // The loop may have looked meanwhile.
        if state.look.as_ref().is_none_or(|(_, looked_at)| *looked_at < asked_at) {
            self.looked(state, look, asked_at);
        }
    }

    /// Claims for as many lanes as are free, while more rows are due than were claimed. Nothing is asked before
    /// `not_before`.
    async fn claim_and_start(
        &self,
        delivery: &Arc<Delivery>,
        state: &mut State,
        not_before: Instant,
    ) -> Result<Claims, StoreError> {
        let mut claims = Claims::Nothing;
        while state.has_free_lane(&self.store) {
            let plugins = self.plugins.current();
            let careful = state.refused.is_some();
            let turn = if careful { Turn::Oldest } else { state.turns.next() };
            let since = if let Turn::Newest(since) = turn { Some(since) } else { None };
            let wanted = Wanted { limit: state.turns.limit(turn), since, no_large: state.turns.large_under_way() };
            let claimed = self.store.claim(plugins.kinds(), wanted, not_before).await?;
            let Claimed { claim, outlook, behind, at, asked_at, begin } = claimed;
            state.head_start.took(begin);
            state.turns.claimed(turn, Came { at, more: outlook.due, behind });
            let is_early = outlook.next_in.is_some_and(|next_in| next_in < HEAD_START);
            // A claim of nothing does not tell whether rows are due that others have locked.
            if turn == Turn::Oldest && (claim.is_some() || is_early) {
                state.ahead = Some((outlook, asked_at));
            }
            if let Some(claim) = claim {
                claims = Claims::Began;
                let load = Load { turn, large: claim.large };
                state.turns.under_way(load);
                let delivery = Arc::clone(delivery);
                state.lanes.spawn(async move { (load, delivery.deliver(claim, &plugins, careful).await) });
            }
            if turn == Turn::Oldest && !outlook.due {
                if is_early && claims == Claims::Nothing {
                    claims = Claims::TooEarly;
                }
                break;
            }
        }
        if claims == Claims::Began {
            state.go_on();
        }
        Ok(claims)
    }

    fn wait(&self, state: &State) -> (Duration, Reason) {
        let (outlook, asked_at) = state.ahead.unwrap_or((Outlook::default(), Instant::now()));
        let since = state.look.as_ref().map_or(self.sweep, |(_, asked_at)| asked_at.elapsed());
        let look = state.sweeps.until_look(&self.store, self.sweep, since);
        wait(outlook, asked_at.elapsed(), state.empty_claims, state.polling.every(), look)
    }

    fn lane_ended(
        &self,
        ended: Result<(Load, Result<Delivered, StoreError>), tokio::task::JoinError>,
        state: &mut State,
    ) {
        // One that panicked may have been any.
        state.turns.ended(ended.as_ref().ok().map(|(load, _)| *load));
        match ended.map(|(_, ended)| ended) {
            // If the broker is away, its return is a wake. If it is there and confirms nothing, asking it again and again
            // would only make duplicates.
            Ok(Ok(Delivered::Unsettled)) if self.broker.is_open() => drop(state.rest()),
            Ok(Ok(Delivered::Unsettled)) => {}
            Ok(Ok(Delivered::Settled { some_left, some_stay })) => {
                if some_left {
                    self.finishes_again(state);
                }
                state.go_on();
                state.failures = 0;
                state.not_before = None;
                state.expected.due_now(state.turns.more());
                // However much there is to deliver, paused rows must not stay where each claim steps over them.
                if state.look.as_ref().is_some_and(|(look, _)| look.paused_first) {
                    self.start_holding(state);
                }
                if some_stay {
                    // When they are due, only a look tells.
                    state.look = None;
                }
            }
            Ok(Ok(Delivered::Refused { why, sent })) => {
                self.refuses_to_finish(&why, state);
                state.go_on();
                state.look = None;
                // What was sent before waits by itself, and must not keep others from showing that they can be finished.
                if sent {
                    state.rest();
                }
            }
            Ok(Err(error)) => {
                if let Some(why) = error.refusal() {
                    self.refuses_to_finish(why, state);
                    state.rest();
                } else {
                    state.failed(&error);
                }
            }
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "a lane panicked, its rows stay");
                state.rest();
            }
        }
    }

    fn refuses_to_finish(&self, why: &str, state: &mut State) {
        state.refused = Some(Instant::now());
        let sentence = format!("PostgreSQL refuses to finish rows whose messages RabbitMQ has: {why}");
        if self.health.trouble(FINISHING, Some(sentence)) {
            warn!(
                why,
                "PostgreSQL refuses to finish rows whose messages RabbitMQ has; they are not sent again, and tried ever less often"
            );
        }
    }

    fn finishes_again(&self, state: &mut State) {
        if state.refused.take().is_some() && self.health.trouble(FINISHING, None) {
            info!("PostgreSQL finishes rows again");
        }
    }

    /// Takes what we cannot claim out of the queue, beside the loop, since there may be millions; not before we know what we
    /// serve.
    fn start_holding(&self, state: &mut State) {
        if state.hold.is_empty() && self.plugins.is_complete() {
            let (store, plugins) = (self.store.clone(), self.plugins.current());
            state.hold.spawn(async move { hold(&store, plugins.kinds()).await });
        }
    }
}
