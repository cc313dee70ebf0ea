//! Whether the server still works on a statement whose answer does not come.
//!
//! When packets vanish (a firewall forgets a connection, a host is lost, an address moves) nothing resets the connection, and
//! the answer is waited for until the statement's deadline. A deadline of a second would find out soon, and would also give up
//! on a server that is merely slow: a lock, a checkpoint, a busy processor. So after a second a new session asks the server
//! what the old one does. If the old session is gone, or waits for its client, the answer was lost, and the statement is given
//! up. If the server works on it, or does not say, the statement is waited for until its deadline.
//!
//! A session that waits for its client is ended as well: a claim keeps its rows locked until the server finds out that its
//! client is gone.

use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::store::Store;

/// A statement usually takes milliseconds.
const ASK_AFTER: Duration = Duration::from_secs(1);
/// How long a new session may take to log in and to answer. One that takes longer is given up, because a packet that was lost
/// is sent again ever later.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// An answer that is on its way arrives within this time.
const ON_ITS_WAY: Duration = Duration::from_millis(250);
/// The pause between two questions grows to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// A session of the server, as others of the same cluster see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Backend {
    /// The process. Its number may be used again.
    pub(super) pid: i32,
    /// When it began, as the server writes it.
    pub(super) began: String,
}

/// What the server says of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It works on a statement.
    Working,
    /// It waits for its client.
    Waiting,
    /// There is no such session.
    Gone,
    /// The server did not answer, or does not say.
    Unknown,
}

impl Store {
    /// Returns when the server is not working on the statement that `backend` was sent, so that its answer was lost; else never.
    /// Cancel-safe.
    pub(in crate::store) async fn until_lost(&self, backend: Option<&Backend>, doing: &'static str) {
        let Some(backend) = backend else { return std::future::pending().await };
        let mut pause = ASK_AFTER;
        loop {
            sleep(pause).await;
            if self.ask(backend, false).await.is_lost() {
                sleep(ON_ITS_WAY).await;
                if self.ask(backend, false).await.is_lost() {
                    warn!(
                        "PostgreSQL answers, but not on the connection on which it was to {doing}: its packets vanish"
                    );
                    // In a task of its own, since the end of the session may arrive as an answer.
                    let (store, backend) = (self.clone(), backend.clone());
                    tokio::spawn(async move { store.ask(&backend, true).await });
                    return;
                }
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Asks what a session does and, if it waits for its client and is to `end`, ends it.
    async fn ask(&self, backend: &Backend, end: bool) -> Doing {
        let asked = async {
            let (mut session, _) = self.log_in().await.ok()?;
            let doing = ask_on(&mut session, backend, end).await.ok();
            let _ = sqlx::Connection::close(session).await;
            doing
        };
        timeout(ANSWER_WITHIN, asked).await.ok().flatten().unwrap_or(Doing::Unknown)
    }
}

impl Doing {
    fn is_lost(self) -> bool {
        matches!(self, Self::Waiting | Self::Gone)
    }
}

async fn ask_on(session: &mut PgConnection, Backend { pid, began }: &Backend, end: bool) -> Result<Doing, sqlx::Error> {
    let query = "SELECT state FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2::text::timestamptz";
    let state: Option<Option<String>> =
        sqlx::query_scalar(query).bind(pid).bind(began).fetch_optional(&mut *session).await?;
    let doing = match state.as_ref().map(Option::as_deref) {
        None => Doing::Gone,
        Some(Some("active")) => Doing::Working,
        Some(Some(state)) if state.starts_with("idle") => Doing::Waiting,
        Some(_) => Doing::Unknown,
    };
    if end && doing == Doing::Waiting {
        sqlx::query("SELECT pg_terminate_backend($1)").bind(pid).execute(session).await?;
    }
    Ok(doing)
}
