//! The pool: the sessions that the store keeps for its statements. A session is opened when it is first needed, up to a
//! maximum. While the server refuses more (`ALTER ROLE … CONNECTION LIMIT`, `max_connections`), the pool goes on with
//! those that it has.
//!
//! sqlx's own pool would keep asking the server for another session although some come back meanwhile, and would ping
//! each session before it lends it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sqlx::PgConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use crate::store::connection::doubt::Doubt;
use crate::store::connection::liveness::Backend;

/// How long a session may be used. The longer it lives, the more memory its process on the server takes.
const MAX_LIFETIME: Duration = Duration::from_mins(30);
/// A session that was not used for this long is closed.
const MAX_IDLE: Duration = Duration::from_mins(10);
/// After the server has refused a session, the time until the pool tries to grow again.
const GROW_INTERVAL: Duration = Duration::from_secs(30);
/// The same, while the pool has fewer than [`MIN_SESSIONS`].
const GROW_INTERVAL_WHEN_SHORT: Duration = Duration::from_secs(3);
/// How long closing a session may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// One session for a claim, and one for everything else.
const MIN_SESSIONS: usize = 2;

/// The sessions, shared by all clones of the store.
#[derive(Debug)]
pub(in crate::store) struct Pool {
    /// One permit for each session that may be in use.
    permits: Arc<Semaphore>,
    sessions: Mutex<Sessions>,
}

#[derive(Debug)]
struct Sessions {
    /// Sessions that are not in use. The one that was given back last is at the end.
    idle: VecDeque<Session>,
    /// How many permits are held, with a session or to open one.
    in_use: usize,
    /// How many sessions the pool may have now.
    size: usize,
    /// How many of the held permits are beyond `size`. They are forgotten when they come back.
    surplus: usize,
    /// How many sessions the pool may ever have.
    max_size: usize,
    /// When the pool last tried in vain to grow, and the server's error; `None` = `size` is `max_size`.
    refused: Option<(Instant, String)>,
    /// Why no session could be opened at the last attempt; `None` = one could.
    last_error: Option<String>,
}

/// A session with the server.
#[derive(Debug)]
pub(in crate::store) struct Session {
    pub(in crate::store) connection: PgConnection,
    /// Which session of the server it is; `None` = our role may not see sessions.
    pub(in crate::store) backend: Option<Backend>,
    opened_at: Instant,
    used_at: Instant,
    /// The statements of looks and claims are prepared on it.
    pub(in crate::store) warm: bool,
}

/// The right to use one session. Dropping it gives the right back.
#[derive(Debug)]
pub(in crate::store) struct SessionPermit {
    pool: Arc<Pool>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Session {
    pub(in crate::store) fn new((connection, backend): (PgConnection, Option<Backend>)) -> Self {
        Self { connection, backend, opened_at: Instant::now(), used_at: Instant::now(), warm: false }
    }

    fn is_usable(&self, doubt: &Doubt) -> bool {
        let age = self.opened_at.elapsed();
        doubt.can_use(age) && age < MAX_LIFETIME
    }

    /// Closes the session, so that the server ends it at once.
    pub(in crate::store) async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, sqlx::Connection::close(self.connection)).await;
    }

    /// Closes the session in a task of its own.
    pub(in crate::store) fn close_in_background(self) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(self.close());
        }
    }
}

impl Pool {
    /// A pool without sessions. `max_size` must be at least 1.
    pub(in crate::store) fn new(max_size: usize) -> Arc<Self> {
        let sessions = Sessions {
            idle: VecDeque::new(),
            in_use: 0,
            size: max_size,
            surplus: 0,
            max_size,
            refused: None,
            last_error: None,
        };
        Arc::new(Self { permits: Arc::new(Semaphore::new(max_size)), sessions: Mutex::new(sessions) })
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().expect("no holder of the lock panics")
    }

    /// Waits until one more session may be in use.
    pub(in crate::store) async fn acquire(self: &Arc<Self>) -> SessionPermit {
        let permit = Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed");
        self.sessions().in_use += 1;
        SessionPermit { pool: Arc::clone(self), permit: Some(permit) }
    }

    /// Whether to ask the server again for a session that it refused before: if all are in use, or there are too few.
    /// If so, the caller must ask, and the interval until the next attempt begins.
    pub(in crate::store) fn is_time_to_grow(&self) -> bool {
        let mut sessions = self.sessions();
        let is_short = sessions.is_short();
        let is_wanted = is_short || self.permits.available_permits() == 0;
        let Some((asked_at, _)) = &mut sessions.refused else { return false };
        let interval = if is_short { GROW_INTERVAL_WHEN_SHORT } else { GROW_INTERVAL };
        let is_time = is_wanted && asked_at.elapsed() > interval;
        if is_time {
            *asked_at = Instant::now();
        }
        is_time
    }

    /// Adds a session that the server granted beyond the current size.
    pub(in crate::store) fn grow(&self, session: Session) {
        let mut sessions = self.sessions();
        if sessions.size < sessions.max_size {
            sessions.size += 1;
            if sessions.surplus > 0 {
                sessions.surplus -= 1;
            } else {
                self.permits.add_permits(1);
            }
        }
        if sessions.size == sessions.max_size {
            sessions.refused = None;
        }
        sessions.last_error = None;
        sessions.idle.push_front(session);
    }

    /// Reduces the pool to the sessions that are open, minus the number `wanted_elsewhere`, but at least to one, after
    /// the server refused another with the error `why`. `has_permit`: the refused session was for the pool and holds a
    /// permit. Returns whether other sessions of the pool are open: the caller can wait until one of them is given
    /// back.
    pub(in crate::store) fn shrink(&self, why: &str, has_permit: bool, wanted_elsewhere: usize) -> bool {
        let mut sessions = self.sessions();
        sessions.refused = Some((Instant::now(), why.to_owned()));
        let in_use = sessions.in_use.saturating_sub(has_permit.into());
        let open = sessions.idle.len() + in_use;
        let size = open.saturating_sub(wanted_elsewhere).max(1);
        if size < sessions.size {
            warn!(sessions = size, "continuing with fewer sessions, since PostgreSQL refuses to open more: {why}");
            let removed = sessions.size - size;
            sessions.surplus += removed - self.permits.forget_permits(removed);
            sessions.size = size;
        }
        while sessions.idle.len() + in_use > sessions.size {
            let Some(session) = sessions.idle.pop_front() else { break };
            session.close_in_background();
        }
        open > 0
    }

    /// Records why a session could not be opened; `None` = one could.
    pub(in crate::store) fn set_last_error(&self, error: Option<String>) {
        self.sessions().last_error = error;
    }

    /// Why no session could be opened at the last attempt; `None` = one could.
    pub(in crate::store) fn last_error(&self) -> Option<String> {
        self.sessions().last_error.clone()
    }

    /// How many sessions claims may hold, so that one is left for everything else: at least 1.
    pub(in crate::store) fn sessions_for_claims(&self) -> usize {
        self.sessions().size.saturating_sub(1).max(1)
    }

    /// The server's error, if it grants too few sessions to deliver and to answer other questions at the same time.
    pub(in crate::store) fn shortage(&self) -> Option<String> {
        let sessions = self.sessions();
        sessions.refused.as_ref().filter(|_| sessions.is_short()).map(|(_, why)| why.clone())
    }
}

impl Sessions {
    fn is_short(&self) -> bool {
        self.size < MIN_SESSIONS.min(self.max_size)
    }
}

impl SessionPermit {
    /// Takes an idle session; `None` = the caller may open one. A session that is warm is left for callers that want a
    /// `warm` one, if another is idle or can be opened. Sessions that are too old, or were open when another broke, are
    /// closed first, so that the server does not count them any more.
    pub(in crate::store) async fn take_idle(&self, warm: bool, doubt: &Doubt) -> Option<Session> {
        let (taken, unusable) = {
            let mut sessions = self.pool.sessions();
            let (usable, unusable) =
                std::mem::take(&mut sessions.idle).into_iter().partition(|idle| idle.is_usable(doubt));
            sessions.idle = usable;
            let can_open = sessions.idle.len() + sessions.in_use <= sessions.size;
            let index = if warm {
                sessions.idle.iter().rposition(|idle| idle.warm).or_else(|| sessions.idle.len().checked_sub(1))
            } else {
                let cold = sessions.idle.iter().position(|idle| !idle.warm);
                cold.or_else(|| (!can_open && !sessions.idle.is_empty()).then_some(0))
            };
            let taken = index.and_then(|index| sessions.idle.remove(index));
            (taken, unusable)
        };
        let unusable: VecDeque<Session> = unusable;
        // All at once: on a dead link each takes until its deadline.
        let closing: Vec<_> = unusable.into_iter().map(|session| tokio::spawn(session.close())).collect();
        for closed in closing {
            let _ = closed.await;
        }
        taken
    }

    /// Gives the right back, and the session if it can be used again.
    pub(in crate::store) fn give_back(mut self, session: Option<Session>) {
        self.end(session);
    }

    fn end(&mut self, session: Option<Session>) {
        let Some(permit) = self.permit.take() else { return };
        let mut sessions = self.pool.sessions();
        sessions.in_use -= 1;
        if let Some(mut session) = session {
            session.used_at = Instant::now();
            sessions.idle.push_back(session);
        }
        while sessions.idle.len() + sessions.in_use > sessions.size
            || sessions.idle.front().is_some_and(|idle| idle.used_at.elapsed() > MAX_IDLE)
        {
            let Some(session) = sessions.idle.pop_front() else { break };
            session.close_in_background();
        }
        if sessions.surplus > 0 {
            sessions.surplus -= 1;
            permit.forget();
        }
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Acquires `count` permits at once.
    async fn acquire(pool: &Arc<Pool>, count: usize) -> Vec<SessionPermit> {
        let mut permits = Vec::new();
        for _ in 0..count {
            permits.push(pool.acquire().await);
        }
        permits
    }

    #[tokio::test]
    async fn a_refused_pool_keeps_its_open_sessions_except_one_that_is_wanted_elsewhere() {
        let pool = Pool::new(11);
        assert_eq!((pool.sessions_for_claims(), pool.shortage()), (10, None));
        // Three are in use, and the server refuses a fourth.
        let permits = acquire(&pool, 4).await;
        assert!(pool.shrink("too many connections", true, 1));
        assert_eq!((pool.sessions_for_claims(), pool.shortage()), (1, None));
        // From now on only two may be in use at once.
        drop(permits);
        assert_eq!(pool.permits.available_permits(), 2);
        assert_eq!(acquire(&pool, 2).await.len(), 2);
        assert!(!pool.is_time_to_grow(), "the server refused a session a moment ago");
    }

    #[tokio::test]
    async fn a_refused_pool_keeps_all_open_sessions_if_none_is_wanted_elsewhere() {
        let pool = Pool::new(11);
        let _permits = acquire(&pool, 3).await;
        assert!(pool.shrink("full", true, 0));
        assert_eq!((pool.sessions_for_claims(), pool.shortage()), (1, None));
    }

    #[tokio::test]
    async fn the_last_session_stays_and_is_reported_as_a_shortage() {
        let pool = Pool::new(11);
        let permits = acquire(&pool, 2).await;
        assert!(pool.shrink("full", true, 1));
        assert_eq!((pool.sessions_for_claims(), pool.shortage().as_deref()), (1, Some("full")));
        drop(permits);
        let _permit = pool.acquire().await;
        assert!(!pool.shrink("full", true, 1), "no other session is open that could come back");
        assert_eq!(pool.permits.available_permits(), 0);
    }

    #[test]
    fn a_pool_of_one_session_is_never_short() {
        let pool = Pool::new(1);
        pool.shrink("full", false, 1);
        assert_eq!((pool.sessions_for_claims(), pool.shortage()), (1, None));
    }
}
