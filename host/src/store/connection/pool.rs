//! The sessions that the store keeps for its statements. It opens one when it is first needed, up to a number, and goes on
//! with those that it has while the server gives no more of them (`ALTER ROLE … CONNECTION LIMIT`, `max_connections`).
//!
//! sqlx's own pool would ask the server again and again for one more, past those that come back meanwhile, and ask each for
//! a sign of life before it lends it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use crate::store::connection::doubt::Doubt;

/// A session takes more memory the longer it lives; it is not used for longer.
const LIFETIME: Duration = Duration::from_mins(30);
/// One that nobody has used for this long is closed.
const IDLE: Duration = Duration::from_mins(10);
/// From one question for a session more than the server gave to the next.
const AGAIN: Duration = Duration::from_secs(30);
/// The same while they are too few.
const SOON: Duration = Duration::from_secs(3);
/// To say goodbye takes no longer.
const GOODBYE: Duration = Duration::from_secs(1);
/// One for a claim, and one for everything else.
const LEAST: usize = 2;

/// The sessions, shared by all who use the store.
#[derive(Debug)]
pub(in crate::store) struct Pool {
    /// One for each session that may be in use.
    permits: Arc<Semaphore>,
    sessions: Mutex<Sessions>,
}

#[derive(Debug)]
struct Sessions {
    /// Those that nobody uses, the one that was given back last at the end.
    idle: VecDeque<Session>,
    /// Permits that are lent, with a session or for one that is being opened.
    in_use: usize,
    /// As many may be in use now.
    size: usize,
    /// Permits beyond that, which are lent still.
    surplus: usize,
    /// As many as may ever be in use.
    most: usize,
    /// When the server last gave us no more, and what it said, while it gives us fewer than `most`.
    refused: Option<(Instant, String)>,
    /// Why none could be opened, when it was last tried.
    trouble: Option<String>,
}

/// A session with the server.
#[derive(Debug)]
pub(in crate::store) struct Session {
    pub(in crate::store) connection: PgConnection,
    opened: Instant,
    used: Instant,
    /// It has learned the statements of looks and claims.
    pub(in crate::store) warm: bool,
}

/// The right to use one session.
#[derive(Debug)]
pub(in crate::store) struct LentSession {
    pool: Arc<Pool>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Session {
    pub(in crate::store) fn new(connection: PgConnection) -> Self {
        Self { connection, opened: Instant::now(), used: Instant::now(), warm: false }
    }

    fn is_good(&self, doubt: &Doubt) -> bool {
        let age = self.opened.elapsed();
        doubt.spares(age) && age < LIFETIME
    }

    /// Says goodbye, so that the server ends the session at once.
    pub(in crate::store) async fn close(self) {
        let _ = tokio::time::timeout(GOODBYE, sqlx::Connection::close(self.connection)).await;
    }

    /// The same, for who cannot wait for it.
    pub(in crate::store) fn close_soon(self) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(self.close());
        }
    }
}

impl Pool {
    /// Without a session. `most` is at least 1.
    pub(in crate::store) fn new(most: usize) -> Arc<Self> {
        let sessions =
            Sessions { idle: VecDeque::new(), in_use: 0, size: most, surplus: 0, most, refused: None, trouble: None };
        Arc::new(Self { permits: Arc::new(Semaphore::new(most)), sessions: Mutex::new(sessions) })
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().expect("nobody panics with it")
    }

    /// Waits until one more session may be in use.
    pub(in crate::store) async fn lend(self: &Arc<Self>) -> LentSession {
        let permit = Arc::clone(&self.permits).acquire_owned().await.expect("it is never closed");
        self.sessions().in_use += 1;
        LentSession { pool: Arc::clone(self), permit: Some(permit) }
    }

    /// Whether it is time to ask the server for one more than it gave: when all are in use, or they are too few.
    pub(in crate::store) fn may_ask_for_more(&self) -> bool {
        let mut sessions = self.sessions();
        let short = sessions.size < LEAST.min(sessions.most);
        let wanted = short || self.permits.available_permits() == 0;
        let Some((asked_at, _)) = &mut sessions.refused else { return false };
        let ask = wanted && asked_at.elapsed() > if short { SOON } else { AGAIN };
        if ask {
            *asked_at = Instant::now();
        }
        ask
    }

    /// The server gave us one more.
    pub(in crate::store) fn grow(&self, session: Session) {
        let mut sessions = self.sessions();
        if sessions.size < sessions.most {
            sessions.size += 1;
            if sessions.surplus > 0 {
                sessions.surplus -= 1;
            } else {
                self.permits.add_permits(1);
            }
        }
        if sessions.size == sessions.most {
            sessions.refused = None;
        }
        sessions.trouble = None;
        sessions.idle.push_front(session);
    }

    /// The server gives us no more than those that are open, of which so many are `wanted_elsewhere`: the others are used from
    /// now on, but always one. `lent`: the one that was refused has a permit. Whether others are open, which come back.
    pub(in crate::store) fn shrink(&self, why: &str, lent: bool, wanted_elsewhere: usize) -> bool {
        let mut sessions = self.sessions();
        sessions.refused = Some((Instant::now(), why.to_owned()));
        let in_use = sessions.in_use.saturating_sub(lent.into());
        let open = sessions.idle.len() + in_use;
        let size = open.saturating_sub(wanted_elsewhere).max(1);
        if size < sessions.size {
            warn!(sessions = size, "going on with fewer sessions, since PostgreSQL gives us no more of them: {why}");
            let gone = sessions.size - size;
            sessions.surplus += gone - self.permits.forget_permits(gone);
            sessions.size = size;
        }
        while sessions.idle.len() + in_use > sessions.size {
            let Some(session) = sessions.idle.pop_front() else { break };
            session.close_soon();
        }
        open > 0
    }

    /// Notes why none could be opened, or that one could.
    pub(in crate::store) fn note(&self, trouble: Option<String>) {
        self.sessions().trouble = trouble;
    }

    /// Why none could be opened, when it was last tried and not since.
    pub(in crate::store) fn trouble(&self) -> Option<String> {
        self.sessions().trouble.clone()
    }

    /// How many sessions claims may keep, so that one is left for everything else: at least 1.
    pub(in crate::store) fn for_claims(&self) -> usize {
        self.sessions().size.saturating_sub(1).max(1)
    }

    /// What the server said, if it gives us too few to deliver and to be asked at the same time.
    pub(in crate::store) fn shortage(&self) -> Option<String> {
        let sessions = self.sessions();
        let short = sessions.size < LEAST.min(sessions.most);
        sessions.refused.as_ref().filter(|_| short).map(|(_, why)| why.clone())
    }
}

impl LentSession {
    /// A session that is open already; `None` = one may be opened. A `warm` one is kept for whoever wants it warm, if another
    /// can be had. None is used that was open when another broke: those are closed first, so that the server does not count
    /// them any more.
    pub(in crate::store) async fn take(&self, warm: bool, doubt: &Doubt) -> Option<Session> {
        let (taken, old) = {
            let mut sessions = self.pool.sessions();
            let (good, old) = std::mem::take(&mut sessions.idle).into_iter().partition(|idle| idle.is_good(doubt));
            sessions.idle = good;
            let room = sessions.idle.len() + sessions.in_use <= sessions.size;
            let found = if warm {
                sessions.idle.iter().rposition(|idle| idle.warm).or_else(|| sessions.idle.len().checked_sub(1))
            } else {
                let cold = sessions.idle.iter().position(|idle| !idle.warm);
                cold.or_else(|| (!room && !sessions.idle.is_empty()).then_some(0))
            };
            let taken = found.and_then(|at| sessions.idle.remove(at));
            (taken, old)
        };
        let old: VecDeque<Session> = old;
        // Side by side: a dead link may keep each for a while.
        let closing: Vec<_> = old.into_iter().map(|session| tokio::spawn(session.close())).collect();
        for closed in closing {
            let _ = closed.await;
        }
        taken
    }

    /// Gives the session back, if it can be used again.
    pub(in crate::store) fn give_back(mut self, session: Option<Session>) {
        self.end(session);
    }

    fn end(&mut self, session: Option<Session>) {
        let Some(permit) = self.permit.take() else { return };
        let mut sessions = self.pool.sessions();
        sessions.in_use -= 1;
        if let Some(mut session) = session {
            session.used = Instant::now();
            sessions.idle.push_back(session);
        }
        while sessions.idle.len() + sessions.in_use > sessions.size
            || sessions.idle.front().is_some_and(|idle| idle.used.elapsed() > IDLE)
        {
            let Some(session) = sessions.idle.pop_front() else { break };
            session.close_soon();
        }
        if sessions.surplus > 0 {
            sessions.surplus -= 1;
            permit.forget();
        }
    }
}

impl Drop for LentSession {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lends `count` permits at once.
    async fn lend(pool: &Arc<Pool>, count: usize) -> Vec<LentSession> {
        let mut lent = Vec::new();
        for _ in 0..count {
            lent.push(pool.lend().await);
        }
        lent
    }

    #[tokio::test]
    async fn as_many_are_used_as_the_server_gives_but_one_that_is_wanted_elsewhere() {
        let pool = Pool::new(11);
        assert_eq!((pool.for_claims(), pool.shortage()), (10, None));
        // Three are in use, and whoever wants a fourth is refused.
        let lent = lend(&pool, 4).await;
        assert!(pool.shrink("too many connections", true, 1));
        assert_eq!((pool.for_claims(), pool.shortage()), (1, None));
        // Only two may be in use at once from now on.
        drop(lent);
        assert_eq!(pool.permits.available_permits(), 2);
        assert_eq!(lend(&pool, 2).await.len(), 2);
        assert!(!pool.may_ask_for_more(), "it was asked a moment ago");
    }

    #[tokio::test]
    async fn all_that_are_open_are_used_while_none_is_wanted_elsewhere() {
        let pool = Pool::new(11);
        let _lent = lend(&pool, 3).await;
        assert!(pool.shrink("full", true, 0));
        assert_eq!((pool.for_claims(), pool.shortage()), (1, None));
    }

    #[tokio::test]
    async fn one_that_is_left_is_a_shortage_and_always_stays() {
        let pool = Pool::new(11);
        let lent = lend(&pool, 2).await;
        assert!(pool.shrink("full", true, 1));
        assert_eq!((pool.for_claims(), pool.shortage().as_deref()), (1, Some("full")));
        drop(lent);
        let _lent = pool.lend().await;
        assert!(!pool.shrink("full", true, 1), "nobody else has one that could come back");
        assert_eq!(pool.permits.available_permits(), 0);
    }

    #[test]
    fn a_pool_of_one_is_not_short_of_what_it_never_wanted() {
        let pool = Pool::new(1);
        pool.shrink("full", false, 1);
        assert_eq!((pool.for_claims(), pool.shortage()), (1, None));
    }
}
