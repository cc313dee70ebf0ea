//! Work by hand on what was set aside: parked rows, and the letters that are dead or parked. What commands and the page
//! both do. Whoever works on letters is alone with them, as a pass of the daemon is.

use std::collections::HashSet;
use std::sync::Mutex;

use serde::Serialize;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, DeadLetterQueue, DeadLetters, SendResult, SendTo};
use crate::dead_letters::replayer::{PassError, drop_letters, take_back, window};
use crate::model::dead_letter::{Fate, PassCounts};
use crate::model::error_chain::error_chain;
use crate::store::{Pass, Store, StoreError};

pub use crate::dead_letters::list::DeadLetterListing;

/// Rows that are put back or dropped by one statement.
const CHUNK: usize = 500;

/// Why nothing, or not everything, was done.
#[derive(Debug, Error)]
pub enum AdminError {
    /// A pass of a daemon, or another person.
    #[error("somebody is making a pass over the dead letters of {0} at this moment; try again soon")]
    Busy(String),
    /// No daemon has ever run, or somebody has deleted it.
    #[error("there are no {what}; the daemon declares their queue when it starts")]
    NoQueue {
        /// RowRef letters.
        what: String,
        /// In the broker's words.
        #[source]
        source: BrokerError,
    },
    /// A server.
    #[error(transparent)]
    Pass(#[from] PassError),
}

impl From<BrokerError> for AdminError {
    fn from(error: BrokerError) -> Self {
        Self::Pass(error.into())
    }
}

impl From<StoreError> for AdminError {
    fn from(error: StoreError) -> Self {
        Self::Pass(error.into())
    }
}

/// RowRef rows or letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All that lie there now.
    All,
    /// Those with these ids.
    Ids(HashSet<String>),
}

impl Selection {
    /// Whether it is meant.
    #[must_use]
    pub fn takes(&self, id: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => id.is_some_and(|id| ids.contains(id)),
        }
    }
}

/// What was done, and what was not.
#[derive(Debug, Default)]
pub struct Done {
    /// How many it was done with.
    pub count: usize,
    /// What stays, and why.
    pub stay: Vec<NotDone>,
}

/// A row or a letter that could not be put back.
#[derive(Debug, Serialize)]
pub struct NotDone {
    /// Its id; a foreign letter may have none.
    pub id: Option<String>,
    /// Why.
    pub why: String,
}

/// Puts parked rows back into the queue, due now. `progress` is told how many more were dealt with.
///
/// # Errors
///
/// When the database does not answer.
pub async fn retry_rows(store: &Store, ids: &[Uuid], progress: impl Fn(usize)) -> Result<Done, StoreError> {
    let mut done = Done::default();
    for chunk in ids.chunks(CHUNK) {
        match store.unpark(chunk).await {
            Err(error) if error.is_refusal() => {
                // One of them cannot go back, since its key is taken for instance: the others can.
                for id in chunk {
                    match store.unpark(&[*id]).await {
                        Ok(one) => done.count += one,
                        Err(error) => {
                            let why = error_chain(&error);
                            done.stay.push(NotDone { id: Some(id.to_string()), why });
                        }
                    }
                }
            }
            count => done.count += count?,
        }
        progress(chunk.len());
    }
    Ok(done)
}

/// Removes parked rows for good.
///
/// # Errors
///
/// As [`retry_rows`].
pub async fn drop_rows(store: &Store, ids: &[Uuid], progress: impl Fn(usize)) -> Result<Done, StoreError> {
    let mut done = Done::default();
    for chunk in ids.chunks(CHUNK) {
        done.count += store.drop_parked(chunk).await?;
        progress(chunk.len());
    }
    Ok(done)
}

/// The right to the letters.
pub(super) async fn alone(store: &Store, broker: &Broker) -> Result<Pass, AdminError> {
    let exchange = broker.exchange();
    store.wait_for_dead_letters(exchange).await?.ok_or_else(|| AdminError::Busy(exchange.to_owned()))
}

pub(super) fn no_queue(pile: DeadLetterQueue, exchange: &str, source: BrokerError) -> AdminError {
    let what = match pile {
        DeadLetterQueue::Dead => format!("dead letters of {exchange}"),
        DeadLetterQueue::Parked => format!("parked letters of {exchange}"),
    };
    AdminError::NoQueue { what, source }
}

/// The letters, and the right to touch them. It must be ended with [`DeadLetterAdmin::end`].
#[derive(Debug)]
pub struct DeadLetterAdmin {
    /// The right, and the time.
    pub(crate) pass: Pass,
    /// The letters.
    pub(crate) letters: DeadLetters,
    exchange: String,
}

impl DeadLetterAdmin {
    /// Gets the right to the letters, and a connection to them. Nothing is touched yet.
    ///
    /// # Errors
    ///
    /// When somebody else has it, or a server does not answer.
    pub async fn alone(store: &Store, broker: &Broker) -> Result<Self, AdminError> {
        let pass = alone(store, broker).await?;
        Ok(Self { pass, letters: broker.dead_letters().await?, exchange: broker.exchange().to_owned() })
    }

    /// Gives everything back that was not acknowledged, and the right.
    pub async fn end(self) {
        self.letters.close().await;
        self.pass.end().await;
    }

    /// How many letters of the pile wait.
    ///
    /// # Errors
    ///
    /// When there is no such queue, or the broker does not answer.
    pub async fn waiting(&self, pile: DeadLetterQueue) -> Result<u32, AdminError> {
        self.letters.waiting(pile).await.map_err(|source| no_queue(pile, &self.exchange, source))
    }

    /// Sends dead letters back, as a pass does. By their ids it goes no further than to the last of them; what lies before it
    /// goes to the end of the queue. Returns what became of them, and how many ids were not met.
    ///
    /// # Errors
    ///
    /// As [`take_back`].
    pub async fn replay(
        &mut self,
        max: u32,
        wanted: &Selection,
        shutdown: &CancellationToken,
    ) -> Result<(PassCounts, usize), AdminError> {
        self.waiting(DeadLetterQueue::Dead).await?;
        let (missing, enough) = (Missing::of(wanted), shutdown.child_token());
        let takes = |letter: &crate::model::dead_letter::DeadLetter| missing.takes(wanted, letter.id.as_deref());
        let stop = |_| missing.stop(&enough);
        let tally = take_back(&self.letters, &mut self.pass, max, takes, stop, &enough).await?;
        Ok((tally, missing.count()))
    }

    /// Removes dead letters for good; as [`DeadLetterAdmin::replay`]. Returns how many, and how many ids were not met.
    ///
    /// # Errors
    ///
    /// As [`drop_letters`].
    pub async fn drop_dead(
        &mut self,
        wanted: &Selection,
        shutdown: &CancellationToken,
    ) -> Result<(u64, usize), AdminError> {
        self.waiting(DeadLetterQueue::Dead).await?;
        let (missing, enough) = (Missing::of(wanted), shutdown.child_token());
        let takes = |letter: &crate::model::dead_letter::DeadLetter| missing.takes(wanted, letter.id.as_deref());
        let stop = |_| missing.stop(&enough);
        let dropped = drop_letters(&self.letters, &mut self.pass, takes, stop, &enough).await?;
        Ok((dropped, missing.count()))
    }

    /// Sends parked letters back into the queues they died in, however often they were replayed. Those that nothing is done
    /// with are back when this ends. `progress` is told how many more were looked at.
    ///
    /// # Errors
    ///
    /// When a server does not answer.
    pub async fn retry_parked(
        &mut self,
        wanted: &Selection,
        progress: impl Fn(usize),
        shutdown: &CancellationToken,
    ) -> Result<Done, AdminError> {
        let mut done = Done::default();
        let mut waiting = self.waiting(DeadLetterQueue::Parked).await?;
        if matches!(wanted, Selection::Ids(_)) {
            // The others are only looked at.
            self.letters.come_back(DeadLetterQueue::Parked).await?;
        }
        while waiting > 0 && !shutdown.is_cancelled() {
            let clock = self.pass.clock().await?;
            let mut back = Vec::new();
            let window = window(&self.letters, DeadLetterQueue::Parked, &mut waiting).await?;
            progress(window.len());
            for letter in window.into_iter().filter(|letter| wanted.takes(letter.says.id.as_deref())) {
                // A person wants it, however often it was replayed.
                let why = match letter.says.fate(clock.now_ms(), 0) {
                    Fate::Replay { queue, expiration_ms, replays } => {
                        back.push((letter, SendTo::Back { queue, expiration_ms, replays }));
                        continue;
                    }
                    Fate::Expired => "its deadline has come, and nobody may see it any more; drop it".into(),
                    Fate::Park(reason) => reason,
                    Fate::Leave(reason) => reason.into(),
                };
                done.stay.push(NotDone { id: letter.says.id, why });
            }
            let (sent, others) = self.letters.send(back).await?;
            done.count += usize::try_from(sent).unwrap_or(usize::MAX);
            for (letter, sent) in others {
                let why = if sent == SendResult::NoQueue { "its queue is gone" } else { "its queue did not take it" };
                done.stay.push(NotDone { id: letter.says.id, why: why.into() });
            }
        }
        Ok(done)
    }

    /// Removes parked letters for good; as [`DeadLetterAdmin::retry_parked`].
    ///
    /// # Errors
    ///
    /// When a server does not answer.
    pub async fn drop_parked(
        &mut self,
        wanted: &Selection,
        progress: impl Fn(usize),
        shutdown: &CancellationToken,
    ) -> Result<Done, AdminError> {
        let mut done = Done::default();
        let mut waiting = self.waiting(DeadLetterQueue::Parked).await?;
        if matches!(wanted, Selection::Ids(_)) {
            // The others are only looked at.
            self.letters.come_back(DeadLetterQueue::Parked).await?;
        }
        while waiting > 0 && !shutdown.is_cancelled() {
            // The lock is still ours.
            self.pass.clock().await?;
            let window = window(&self.letters, DeadLetterQueue::Parked, &mut waiting).await?;
            progress(window.len());
            for letter in window.iter().filter(|letter| wanted.takes(letter.says.id.as_deref())) {
                self.letters.acknowledge(letter).await?;
                done.count += 1;
            }
        }
        Ok(done)
    }
}

/// The ids that were not met yet; `None` = all letters are meant.
struct Missing(Option<Mutex<HashSet<String>>>);

impl Missing {
    fn of(wanted: &Selection) -> Self {
        match wanted {
            Selection::All => Self(None),
            Selection::Ids(ids) => Self(Some(Mutex::new(ids.clone()))),
        }
    }

    /// Whether this one is meant; then it was met.
    fn takes(&self, wanted: &Selection, id: Option<&str>) -> bool {
        if let (Some(missing), Some(id)) = (&self.0, id) {
            missing.lock().expect("nobody panics with it").remove(id);
        }
        wanted.takes(id)
    }

    fn count(&self) -> usize {
        self.0.as_ref().map_or(0, |missing| missing.lock().expect("nobody panics with it").len())
    }

    /// Goes no further if all were met.
    fn stop(&self, enough: &CancellationToken) {
        if self.0.is_some() && self.count() == 0 {
            enough.cancel();
        }
    }
}
