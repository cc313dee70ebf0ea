//! Looks whether the daemon's exchanges, queues and binding exist, declares what is missing, binds, and remembers for
//! an hour what was lost. The opening of `topology/mod.rs` says when, and in which steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::Connection;
use tracing::{info, warn};

use crate::broker::topology;
use crate::broker::topology::{Binding, DELAYED_MESSAGE, DeclareResult, DeclaredEntity};
use crate::broker::{Broker, BrokerError};
use crate::model::intake::Intake;

/// How often what exists is declared as well, so that RabbitMQ compares its arguments.
const COMPARE_INTERVAL: Duration = Duration::from_mins(1);
/// How long a loss is reported.
const LOSS_REPORTED_FOR: Duration = Duration::from_hours(1);
/// How many losses are reported at most, the newest.
const MAX_LOSSES: usize = 10;

/// What the daemon knows of its exchanges, queues and bindings.
#[derive(Debug)]
pub(in crate::broker) struct TopologyState {
    entities: Vec<EntityState>,
    bindings: Vec<BindingState>,
    last_compared: Option<Instant>,
    /// The oldest first.
    losses: Vec<Loss>,
}

/// What the daemon knows of one exchange or queue.
#[derive(Debug)]
struct EntityState {
    entity: DeclaredEntity,
    /// The type of an exchange that is used as it is, if it is another than the daemon would declare.
    other_type: Option<String>,
    /// When it was last found.
    last_seen: Option<Instant>,
    /// It has been missing since then.
    is_missing: bool,
    /// It exists with other properties than it must have.
    has_mismatch: bool,
    /// The daemon's user may not declare it.
    declare_refused: bool,
}

/// What the daemon knows of one binding.
#[derive(Debug)]
struct BindingState {
    binding: Binding,
    /// The daemon's user may not bind.
    is_refused: bool,
    /// It was made.
    was_bound: bool,
    /// RabbitMQ did not answer when it was to be made again.
    is_unanswered: bool,
}

/// An exchange, a queue or the binding was missing for a time.
#[derive(Debug)]
struct Loss {
    /// `None` = the binding of `tidings.dead` to `tidings.dlx`.
    entity: Option<DeclaredEntity>,
    /// How long it was missing at most: from when it was last seen until it existed again.
    gone_for: Duration,
    ended: Instant,
}

impl Broker {
    /// Looks whether the daemon's exchanges and queues exist, declares what is missing, and binds; once a minute it
    /// also compares what exists. Does nothing while there is no connection, or while RabbitMQ blocks it, since it then
    /// answers nothing.
    ///
    /// # Errors
    ///
    /// When an exchange or queue is missing and the daemon's user may not declare it, when one has other properties
    /// than it must have, or when RabbitMQ does not answer.
    pub async fn repair_topology(&self) -> Result<(), BrokerError> {
        let connection = self.connection.lock().await.clone();
        match connection.filter(|_| self.is_open()) {
            Some(connection) => self.repair_topology_on(&connection, false).await,
            None => Ok(()),
        }
    }

    /// As [`Broker::repair_topology`], on this connection. On a `fresh` one everything is compared, and declarations
    /// that were refused are tried again.
    pub(in crate::broker) async fn repair_topology_on(
        &self,
        connection: &Connection,
        fresh: bool,
    ) -> Result<(), BrokerError> {
        let mut state = self.topology_state.lock().await;
        let TopologyState { entities, bindings, last_compared, losses } = &mut *state;
        let compare = fresh || last_compared.is_none_or(|at| at.elapsed() >= COMPARE_INTERVAL);
        let (mut missing, mut failed) = (Vec::new(), None);
        for entity_state in &mut *entities {
            entity_state.declare_refused &= !fresh;
            match self.repair_entity(connection, entity_state, compare).await {
                Ok(Some(loss)) => losses.push(loss),
                Ok(None) if entity_state.is_missing => missing.push(self.wanted(&entity_state.entity)),
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        // Each time, since a binding may be lost alone, and AMQP has no request that shows whether it exists.
        for BindingState { binding, is_refused, was_bound, is_unanswered } in bindings {
            *is_refused &= !fresh;
            let state_of = |entity: &DeclaredEntity| entities.iter().find(|state| state.entity == *entity);
            let (queue, source) = (state_of(&binding.queue), state_of(&binding.source));
            let can_bind = [queue, source].into_iter().flatten().all(|state| !state.is_missing)
                // There each routing key has a binding of its own, which only an operator knows.
                && source.and_then(|source| source.other_type.as_deref()) != Some("direct");
            if *is_refused || !can_bind {
                continue;
            }
            let bound = topology::bind(connection, &self.exchange, binding, *was_bound).await;
            let was_unanswered = std::mem::replace(is_unanswered, matches!(bound, Err(BrokerError::Deadline { .. })));
            match bound {
                Ok(DeclareResult::Done) => *was_bound = true,
                // While a node of a cluster stands still, the others wait for it before they change their metadata. They have
                // the binding, and take messages all the same.
                Err(error @ BrokerError::Deadline { .. }) if *was_bound => {
                    if !was_unanswered {
                        info!("{error}; it was there before, and is asked for again every few seconds");
                    }
                }
                // The operator who declared the queue has bound it as well.
                Ok(DeclareResult::NotPermitted(_)) if queue.is_some_and(|queue| queue.declare_refused) => {
                    *is_refused = true;
                }
                Ok(DeclareResult::NotPermitted(error)) | Err(error) => failed = failed.or(Some(error)),
            }
        }
        if compare {
            *last_compared = Some(Instant::now());
        }
        losses.retain(|loss| loss.ended.elapsed() < LOSS_REPORTED_FOR);
        losses.drain(..losses.len().saturating_sub(MAX_LOSSES));
        if let Some(error) = failed {
            return Err(error);
        }
        if !missing.is_empty() {
            return Err(BrokerError::Missing { what: missing.join(", and ") });
        }
        Ok(())
    }

    /// Declares one exchange or queue if that is necessary. Returns its loss if it was missing and exists again.
    async fn repair_entity(
        &self,
        connection: &Connection,
        state: &mut EntityState,
        compare: bool,
    ) -> Result<Option<Loss>, BrokerError> {
        let entity = &state.entity;
        let mut exists = topology::declare_passively(connection, entity, &self.exchange).await?.is_ok();
        state.is_missing |= !exists;
        // RabbitMQ logs each refusal: what exists and may not be declared is not declared again on this connection.
        if !exists || state.has_mismatch || (compare && !state.declare_refused) {
            let declared = topology::declare(connection, entity, &self.exchange, self.queue_type).await;
            let declared = match declared {
                Err(error @ BrokerError::Mismatch { .. }) if entity.is_used_as_it_is() => {
                    state.other_type = topology::current_type(&error);
                    if state.other_type.as_deref() == Some(DELAYED_MESSAGE) {
                        state.has_mismatch = true;
                        return Err(BrokerError::Delayed { exchange: entity.name(&self.exchange) });
                    }
                    Ok(DeclareResult::Done)
                }
                declared => {
                    state.other_type = None;
                    declared
                }
            };
            state.has_mismatch = matches!(declared, Err(BrokerError::Mismatch { .. }));
            let refused = matches!(declared?, DeclareResult::NotPermitted(_));
            if refused && !state.declare_refused && exists {
                info!(
                    "RabbitMQ does not let the daemon's user declare {}: it is used as it is",
                    entity.describe(&self.exchange)
                );
            }
            state.declare_refused = refused;
            exists |= !refused;
        }
        if !exists {
            return Ok(None);
        }
        let (was_missing, last_seen) = (std::mem::take(&mut state.is_missing), state.last_seen.replace(Instant::now()));
        Ok(last_seen.filter(|_| was_missing).map(|last_seen| {
            let loss =
                Loss { entity: Some(state.entity.clone()), gone_for: last_seen.elapsed(), ended: Instant::now() };
            warn!("{}", loss.sentence(&self.exchange));
            loss
        }))
    }

    /// Records that `tidings.dead` was not bound for at most `gone_for`, as the management API showed.
    pub async fn record_lost_binding(&self, gone_for: Duration) {
        let loss = Loss { entity: None, gone_for, ended: Instant::now() };
        warn!("{}", loss.sentence(&self.exchange));
        self.topology_state.lock().await.losses.push(loss);
    }

    /// An exchange or queue with every property that it must have, for an operator who declares it.
    #[must_use]
    pub fn wanted(&self, entity: &DeclaredEntity) -> String {
        entity.describe_declaration(&self.exchange, self.queue_type)
    }

    /// A sentence for each intake whose queue this daemon cannot bind, because its exchange is of the type direct.
    pub async fn unbound_intakes(&self) -> Vec<String> {
        let state = self.topology_state.lock().await;
        let direct = state.entities.iter().filter(|state| state.other_type.as_deref() == Some("direct"));
        let sentence = |entity: &DeclaredEntity| {
            let DeclaredEntity::IntakeSource(intake) = entity else { return None };
            let queue = intake.queue(&self.exchange);
            Some(format!(
                "{} is of the type direct, in which each routing key needs a binding of its own: bind the queue {queue} to it with each key that is used, or declare it anew as topic, which its publishers need not notice",
                entity.describe(&self.exchange)
            ))
        };
        direct.filter_map(|state| sentence(&state.entity)).collect()
    }

    /// A sentence for each exchange, queue or binding that was missing within the last hour, because messages may have
    /// been lost.
    pub async fn recent_losses(&self) -> Vec<String> {
        let state = self.topology_state.lock().await;
        let sentence = |loss: &Loss| {
            format!("{} ({} min ago)", loss.sentence(&self.exchange), loss.ended.elapsed().as_secs() / 60)
        };
        state.losses.iter().map(sentence).collect()
    }
}

impl TopologyState {
    /// The state before anything was looked at.
    pub(in crate::broker) fn new(exchange: &str, intakes: &[Arc<Intake>]) -> Self {
        let entity = |entity| EntityState {
            entity,
            other_type: None,
            last_seen: None,
            is_missing: false,
            has_mismatch: false,
            declare_refused: false,
        };
        Self {
            entities: DeclaredEntity::all(exchange, intakes).into_iter().map(entity).collect(),
            bindings: Binding::all(intakes)
                .into_iter()
                .map(|binding| BindingState { binding, is_refused: false, was_bound: false, is_unanswered: false })
                .collect(),
            last_compared: None,
            losses: Vec::new(),
        }
    }
}

impl Loss {
    fn sentence(&self, exchange: &str) -> String {
        let consequence = match self.entity {
            Some(DeclaredEntity::Exchange | DeclaredEntity::IntakeTarget(_)) => {
                "and the bindings of consumers' queues with it: rows wait until the queues are bound again"
            }
            Some(DeclaredEntity::DeadQueue) => {
                "with the letters that lay in it, and what consumers rejected meanwhile is lost"
            }
            Some(DeclaredEntity::ParkingQueue) => "with the letters that lay in it",
            Some(DeclaredEntity::IntakeSource(_)) => "and publishers were refused meanwhile",
            Some(DeclaredEntity::IntakeQueue(_)) => {
                "with the messages that lay in it, and what was published to its intake meanwhile is lost"
            }
            Some(DeclaredEntity::DeadLetterExchange) | None => "and what consumers rejected meanwhile is lost",
        };
        let what = if let Some(entity) = &self.entity {
            entity.describe(exchange)
        } else {
            let (queue, source) = (DeclaredEntity::DeadQueue, DeclaredEntity::DeadLetterExchange);
            Binding { queue, source, key: "" }.describe(exchange)
        };
        format!("{what} was gone for up to {} s, {consequence}; it is there again", self.gone_for.as_secs() + 1)
    }
}
