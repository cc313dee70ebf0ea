//! The daemons of one exchange, and whether this one may deliver.
//!
//! A copy of a database (a dump that was restored, a snapshot, a restore to a point in time) has the origin's pending rows. If it is
//! started as a staging system with the origin's RabbitMQ, its daemon would send each message a second time. So the database
//! records from which server it was last delivered (`tidings.installation`), and daemons announce themselves to each other, at
//! the start and every minute, with the id of their installation. A daemon that finds its database on another server than is
//! recorded asks who is there, and waits for a second. If a daemon answers that works on the same installation and not on this
//! database, this daemon delivers nothing and says why. If nobody does, the database was moved, upgraded or restored: the
//! daemon says so once and delivers.
//!
//! ```text
//!   tidings.installation ──recorded, here──▶ standing.rs decides ──▶ the scheduler and the replayer start
//!   exchange tidings.fleet ◀──announce, hear──┘
//! ```
//!
//! To find out whether another daemon works on this database, a daemon does not compare addresses. Each daemon makes an id when it
//! starts, announces it, and holds a lock of that name in its database, on the connection of its listener. A daemon that delivers
//! goes on when its database moves, as in a failover.
//!
//! The daemon starts the scheduler, the replayer and the canary only when it may deliver.
//!
//! Must never stop a daemon that has begun to deliver.

mod standing;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tidings_core::backoff::RECONNECT;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, FleetChannel};
use crate::model::backoff::jittered;
use crate::model::health::Health;
use crate::model::installation::{Announcement, Identity, Server};
use crate::store::{Store, StoreError};
use standing::{Fleet, INTERVAL, Relation, Standing};

/// The subject of the notices of this part.
const ABOUT: &str = "installation";
/// How long to wait while there is no connection to RabbitMQ, or to PostgreSQL for the listener.
const RETRY: Duration = Duration::from_millis(100);
/// How long to wait before RabbitMQ is asked again for what our user may not do: it logs each refusal.
const NOT_PERMITTED: Duration = Duration::from_mins(15);
/// So many addresses of one server are remembered.
const MAX_ADDRESSES: usize = 8;

/// What the loop needs.
#[derive(Debug)]
pub struct FleetWatch {
    /// The database.
    pub store: Store,
    /// The broker through which daemons hear each other.
    pub broker: Arc<Broker>,
    /// Gets why the daemon delivers nothing, and notes.
    pub health: Arc<Health>,
    /// The id under which the listener announces this daemon.
    pub daemon: Uuid,
    /// `TIDINGS_ADOPT`: deliver from this database, even if it is a copy.
    pub adopt: bool,
}

/// The loop, once the database has said which it is.
struct Watching {
    parts: FleetWatch,
    /// To be called when the daemon may deliver; `None` = it was.
    may_deliver: Option<Box<dyn FnOnce() + Send>>,
    began: Instant,
    identity: Identity,
    /// The doubt about the connections at which the identity was read: after another, the server may be another.
    doubt: u64,
    fleet: Fleet,
    /// Why nothing is delivered, as it was last logged.
    trouble: Option<String>,
}

/// Why the loop has to begin again.
#[derive(Debug, thiserror::Error)]
enum FleetError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FleetWatch {
    /// Runs until `shutdown`. Calls `may_deliver` when the daemon may deliver.
    pub async fn run(self, shutdown: CancellationToken, may_deliver: impl FnOnce() + Send + 'static) {
        let _ = shutdown.run_until_cancelled(self.watch(Box::new(may_deliver))).await;
    }

    async fn watch(self, may_deliver: Box<dyn FnOnce() + Send>) -> std::convert::Infallible {
        let mut failures = 0;
        let (doubt, identity) = loop {
            let doubt = self.store.last_doubt();
            match read_identity(&self.store).await {
                Ok(identity) => break (doubt, identity),
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "could not find out which installation this is, trying again"
                    );
                }
            }
            tokio::time::sleep(jittered(&RECONNECT, failures)).await;
            failures = failures.saturating_add(1);
        };
        let fleet = Fleet::new(&identity, self.adopt);
        let mut watching = Watching {
            parts: self,
            may_deliver: Some(may_deliver),
            began: Instant::now(),
            identity,
            doubt,
            fleet,
            trouble: None,
        };
        let mut is_logged = false;
        failures = 0;
        loop {
            let pause = match watching.hear(&mut failures).await {
                Ok(()) => RETRY,
                Err(error) => {
                    let is_not_permitted = matches!(&error, FleetError::Broker(error) if error.is_not_permitted());
                    if is_not_permitted {
                        // Nobody will be heard, so waiting would be of no use.
                        watching.fleet.note_asked(watching.now());
                        if !std::mem::replace(&mut is_logged, true) {
                            info!(
                                error = &error as &dyn std::error::Error,
                                "this daemon may not hear the other daemons of its exchange, so it cannot tell whether its database is a copy"
                            );
                        }
                    }
                    if failures == 0 && !is_not_permitted {
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "cannot hear the other daemons of the exchange, trying again"
                        );
                    }
                    failures = failures.saturating_add(1);
                    if is_not_permitted { NOT_PERMITTED } else { jittered(&RECONNECT, failures) }
                }
            };
            watching.decide_within(pause).await;
        }
    }
}

impl Watching {
    fn now(&self) -> standing::Moment {
        self.began.elapsed()
    }

    /// Waits for so long, and decides when it is time to.
    async fn decide_within(&mut self, pause: Duration) {
        let end = Instant::now() + pause;
        loop {
            let decide_at = match self.apply().await {
                Ok(decide_at) => decide_at.map_or(end, |until| (self.began + until).min(end)),
                // The next round says why.
                Err(_) => end.min(Instant::now() + Duration::from_secs(1)),
            };
            tokio::time::sleep_until(decide_at).await;
            if decide_at == end {
                return;
            }
        }
    }

    /// Hears the others until the connection is lost. Returns soon if there is none.
    async fn hear(&mut self, failures: &mut u32) -> Result<(), FleetError> {
        self.apply().await?;
        // Otherwise the others would not find us in their database.
        while !self.parts.health.listening.load(Ordering::Relaxed) {
            tokio::time::sleep(RETRY).await;
        }
        let Some(mut channel) = self.parts.broker.open_fleet().await? else { return Ok(()) };
        if self.announce(&channel, true).await? {
            self.fleet.note_asked(self.now());
        }
        *failures = 0;
        let mut announce_at = Instant::now() + INTERVAL;
        loop {
            let decide_at = self.apply().await?.map_or(announce_at, |until| (self.began + until).min(announce_at));
            tokio::select! {
                body = channel.next() => {
                    let body = body?;
                    self.note_announcement(&channel, &body).await?;
                }
                () = tokio::time::sleep_until(decide_at) => {
                    if Instant::now() >= announce_at {
                        announce_at = Instant::now() + INTERVAL;
                        self.announce(&channel, false).await?;
                    }
                }
            }
        }
    }

    /// Tells the others who we are, unless the listener has no connection. Returns whether it did.
    async fn announce(&mut self, channel: &FleetChannel, asks: bool) -> Result<bool, FleetError> {
        self.follow_database().await?;
        let Identity { installation, here, .. } = &self.identity;
        let is_listening = self.parts.health.listening.load(Ordering::Relaxed);
        if is_listening {
            let (installation, daemon, server) = (*installation, self.parts.daemon, here.clone());
            let delivers = self.may_deliver.is_none();
            let announcement = Announcement { installation, daemon, server, delivers, asks };
            channel.announce(&serde_json::to_vec(&announcement).expect("texts and numbers")).await?;
        }
        Ok(is_listening)
    }

    /// Reads again where the database is, if a connection broke since it was read.
    async fn follow_database(&mut self) -> Result<(), StoreError> {
        let doubt = self.parts.store.last_doubt();
        if doubt != self.doubt {
            self.identity = read_identity(&self.parts.store).await?;
            self.doubt = doubt;
        }
        Ok(())
    }

    async fn note_announcement(&mut self, channel: &FleetChannel, body: &[u8]) -> Result<(), FleetError> {
        let Ok(Announcement { installation, daemon, server, delivers, asks }) = serde_json::from_slice(body) else {
            return Ok(());
        };
        if daemon == self.parts.daemon {
            return Ok(());
        }
        let relation = if installation != self.identity.installation {
            Relation::Stranger
        } else if self.parts.store.has_daemon(daemon).await? {
            Relation::Ours
        } else {
            Relation::Copy
        };
        // Of two copies that wait for each other, neither would ever deliver.
        if delivers {
            self.fleet.note_heard(self.now(), daemon, relation, server);
        }
        if asks {
            self.announce(channel, false).await?;
        }
        Ok(())
    }

    /// Lets the daemon deliver, or keeps it from that, and says what an operator should know. Returns when to decide again.
    async fn apply(&mut self) -> Result<Option<standing::Moment>, StoreError> {
        let standing = self.fleet.decide(self.now());
        let here = &self.identity.here;
        let trouble = match &standing {
            Standing::IsCopy(origin) => Some(format!(
                "nothing is delivered: this database ({here}) is a copy, and daemons serve its origin ({origin}); give this daemon another RabbitMQ or TIDINGS_EXCHANGE, or set TIDINGS_ADOPT=1 to deliver from here as well"
            )),
            Standing::Unknown(_) => Some(format!(
                "nothing is delivered for a moment: this database ({here}) is not where it was, and daemons are asked whether they serve its origin"
            )),
            Standing::Delivers => None,
        };
        self.parts.health.trouble(ABOUT, trouble.clone());
        if let Some(sentence) = &trouble
            && trouble != self.trouble
        {
            warn!("{sentence}");
        }
        self.trouble = trouble;
        let note = self.note();
        if self.parts.health.note(ABOUT, note.clone())
            && let Some(note) = note
        {
            warn!("{note}");
        }
        match standing {
            Standing::Unknown(until) => Ok(until),
            Standing::IsCopy(_) => Ok(None),
            Standing::Delivers => {
                self.record().await?;
                if let Some(may_deliver) = self.may_deliver.take() {
                    may_deliver();
                }
                Ok(None)
            }
        }
    }

    /// Records the server, if it is not recorded.
    async fn record(&mut self) -> Result<(), StoreError> {
        let Identity { recorded, here, .. } = &self.identity;
        if recorded.contains(here) {
            return Ok(());
        }
        // Daemons may reach one server by several addresses.
        let others = recorded.iter().filter(|other| other.is_like(here));
        let servers: Vec<Server> = std::iter::once(here).chain(others).take(MAX_ADDRESSES).cloned().collect();
        self.parts.store.record_servers(&servers).await?;
        if let Some(last) = recorded.first() {
            info!("rows were last delivered from {last}, and are delivered from {here} from now on");
        }
        self.identity.recorded = servers;
        Ok(())
    }

    /// What an operator should know although it stops nothing.
    fn note(&self) -> Option<String> {
        if let Some(other) = self.fleet.server_of(Relation::Stranger) {
            return Some(format!(
                "daemons of another installation ({other}) use the exchange {} as well: consumers get the messages of both; set TIDINGS_EXCHANGE to keep them apart",
                self.parts.broker.exchange()
            ));
        }
        let copy = self.fleet.server_of(Relation::Copy).filter(|_| self.may_deliver.is_none())?;
        Some(format!(
            "daemons serve a copy of this database ({copy}), or its origin: if both deliver, consumers get each message twice"
        ))
    }
}

/// Reads which installation this is. The first daemon gives it an id.
async fn read_identity(store: &Store) -> Result<Identity, StoreError> {
    loop {
        if let Some(identity) = store.identity().await? {
            return Ok(identity);
        }
        store.make_installation().await?;
    }
}
