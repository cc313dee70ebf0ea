//! What the daemon does for what is its own, at each new connection and every few seconds: it looks, declares what is gone,
//! binds, and remembers what was lost. Where it may not declare it uses what is there.

use std::time::{Duration, Instant};

use lapin::Connection;
use tracing::{info, warn};

use crate::broker::topology;
use crate::broker::topology::{OwnEntity, Permitted};
use crate::broker::{Broker, BrokerError};

/// From one comparison of what is there with what ought to be there to the next.
const COMPARE: Duration = Duration::from_mins(1);
/// How long a loss is told of, and how many at most.
const MEMORY: Duration = Duration::from_hours(1);
const MEMORIES: usize = 10;

/// What is known of what is ours.
#[derive(Debug, Default)]
pub(in crate::broker) struct Ledger {
    records: [Record; 4],
    compared: Option<Instant>,
    losses: Vec<Loss>,
    /// Our user may not bind.
    unbindable: bool,
}

/// What is known of one.
#[derive(Debug, Default)]
struct Record {
    /// When it was there, the last time that somebody looked.
    seen: Option<Instant>,
    /// It was not there since.
    absent: bool,
    /// It is another than it ought to be.
    wrong: bool,
    /// Our user may not declare it.
    refused: bool,
}

/// Something was gone for a time.
#[derive(Debug)]
struct Loss {
    /// `None` = what binds `tidings.dead` to `tidings.dlx`.
    own: Option<OwnEntity>,
    /// From when it was seen last to when it was there again: how long it was gone at most.
    gone: Duration,
    ended: Instant,
}

impl Broker {
    /// Looks at what is ours, declares what is gone and binds; now and then it compares, too. Nothing while there is no
    /// connection, or RabbitMQ blocks it and answers nothing.
    ///
    /// # Errors
    ///
    /// When something is gone and our user may not declare it, is another than it ought to be, or the broker does not answer.
    pub async fn keep(&self) -> Result<(), BrokerError> {
        let connection = self.connection.lock().await.clone();
        match connection.filter(|_| self.is_open()) {
            Some(connection) => self.keep_on(&connection, false).await,
            None => Ok(()),
        }
    }

    /// The same on this connection; on a `fresh` one everything is compared, and what was refused is tried again.
    pub(in crate::broker) async fn keep_on(&self, connection: &Connection, fresh: bool) -> Result<(), BrokerError> {
        let mut ledger = self.ledger.lock().await;
        let Ledger { records, compared, losses, unbindable } = &mut *ledger;
        let compare = fresh || compared.is_none_or(|at| at.elapsed() >= COMPARE);
        let (mut missing, mut failed) = (Vec::new(), None);
        for (own, record) in OwnEntity::ALL.into_iter().zip(&mut *records) {
            record.refused &= !fresh;
            match self.keep_one(connection, own, record, compare).await {
                Ok(Some(loss)) => losses.push(loss),
                Ok(None) if record.absent => missing.push(self.wanted(own)),
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let [.., dead_letter_exchange, dead, _] = &*records;
        *unbindable &= !fresh;
        // It may have been lost alone, and over AMQP nobody can ask for it.
        if !dead_letter_exchange.absent && !dead.absent && !*unbindable {
            match topology::bind(connection, &self.exchange).await {
                Ok(Permitted::Done) => {}
                // Whoever declared it has bound it.
                Ok(Permitted::Refused(_)) if dead.refused => *unbindable = true,
                Ok(Permitted::Refused(error)) | Err(error) => failed = failed.or(Some(error)),
            }
        }
        if compare {
            *compared = Some(Instant::now());
        }
        losses.retain(|loss| loss.ended.elapsed() < MEMORY);
        losses.drain(..losses.len().saturating_sub(MEMORIES));
        if let Some(error) = failed {
            return Err(error);
        }
        if !missing.is_empty() {
            return Err(BrokerError::Missing { what: missing.join(", and ") });
        }
        Ok(())
    }

    /// Returns what was lost, if it is there again.
    async fn keep_one(
        &self,
        connection: &Connection,
        own: OwnEntity,
        record: &mut Record,
        compare: bool,
    ) -> Result<Option<Loss>, BrokerError> {
        let mut there = topology::look(connection, own, &self.exchange).await?.is_ok();
        record.absent |= !there;
        // RabbitMQ logs each refusal: what may not be declared and is there is let be until the next connection.
        if !there || record.wrong || (compare && !record.refused) {
            let declared = topology::declare(connection, own, &self.exchange, self.queue_type).await;
            record.wrong = matches!(declared, Err(BrokerError::Mismatch { .. }));
            let refused = matches!(declared?, Permitted::Refused(_));
            if refused && !record.refused && there {
                info!("RabbitMQ does not let us declare {}: it is used as it is", own.describe(&self.exchange));
            }
            record.refused = refused;
            there |= !refused;
        }
        if !there {
            return Ok(None);
        }
        let (was_absent, seen) = (std::mem::take(&mut record.absent), record.seen.replace(Instant::now()));
        Ok(seen.filter(|_| was_absent).map(|seen| {
            let loss = Loss { own: Some(own), gone: seen.elapsed(), ended: Instant::now() };
            warn!("{}", loss.sentence(&self.exchange));
            loss
        }))
    }

    /// Remembers that `tidings.dead` was not bound for so long at most, which AMQP does not tell.
    pub async fn was_unbound(&self, gone: Duration) {
        let loss = Loss { own: None, gone, ended: Instant::now() };
        warn!("{}", loss.sentence(&self.exchange));
        self.ledger.lock().await.losses.push(loss);
    }

    /// One of ours, and all that it must be, for who declares it by other means.
    #[must_use]
    pub fn wanted(&self, own: OwnEntity) -> String {
        own.wanted(&self.exchange, self.queue_type)
    }

    /// What was gone within the last hour, in sentences: it may be that letters were lost.
    pub async fn losses(&self) -> Vec<String> {
        let ledger = self.ledger.lock().await;
        let sentence = |loss: &Loss| {
            format!("{} ({} min ago)", loss.sentence(&self.exchange), loss.ended.elapsed().as_secs() / 60)
        };
        ledger.losses.iter().map(sentence).collect()
    }
}

impl Loss {
    fn sentence(&self, exchange: &str) -> String {
        let with_it = match self.own {
            Some(OwnEntity::Exchange) => {
                "the bindings of consumers with it: rows wait until their queues are bound again"
            }
            Some(OwnEntity::Dead) => "with the letters that lay in it, and what consumers rejected meanwhile is lost",
            Some(OwnEntity::Parking) => "with the letters that lay in it",
            Some(OwnEntity::DeadLetterExchange) | None => "and what consumers rejected meanwhile is lost",
        };
        let what = if let Some(own) = self.own {
            own.describe(exchange)
        } else {
            let (queue, source) =
                (OwnEntity::Dead.describe(exchange), OwnEntity::DeadLetterExchange.describe(exchange));
            format!("the binding of {queue} to {source}")
        };
        format!("{what} was gone for up to {} s, {with_it}; it is there again", self.gone.as_secs() + 1)
    }
}
