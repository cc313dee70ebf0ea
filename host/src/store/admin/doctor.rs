//! What `tidings doctor` asks of the database server. It reads, and sends itself one notification on a channel of its
//! own. Must never write a row, nor read more than a few rows, however many there are.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

use crate::store::connection::run_bounded;
use crate::store::{Store, StoreError};

/// The oldest release of PostgreSQL that the migrations and the statements work with, as `server_version_num`.
const OLDEST_SUPPORTED: i32 = 150_000;
/// The channel that only `tidings doctor` uses. No daemon listens on it.
const CHANNEL: &str = "tidings_doctor";
/// How long to wait for a notification, which usually takes a millisecond.
const NOTIFY_DEADLINE: Duration = Duration::from_secs(5);
/// How often the clocks are compared. The reading with the shortest round trip is the most exact.
const READINGS: usize = 5;
/// A session or a prepared transaction that holds back the horizon of VACUUM for longer than this is reported.
pub const MAX_HOLD_AGE: Duration = Duration::from_mins(5);
/// A replication slot or a standby that holds back the horizon by more transactions than this is reported. The server
/// does not tell since when it does so; a healthy one never lags this far behind.
const MAX_TRANSACTIONS_BEHIND: i32 = 1_000_000;

/// The release of a PostgreSQL server.
#[derive(Clone, Debug)]
pub struct ServerVersion {
    /// As `server_version_num`.
    number: i32,
    /// As `server_version`, for people.
    pub text: String,
}

/// How far two clocks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skew {
    /// How far this host's clock is ahead of the database's; negative = behind.
    pub ahead: time::Duration,
    /// The error of `ahead`: half the round trip of the reading.
    pub give_or_take: Duration,
}

/// What can hold back the horizon of VACUUM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolderKind {
    /// A session in a transaction.
    Session,
    /// A standby that reports its queries (`hot_standby_feedback`), without a slot.
    Standby,
    /// A prepared transaction that was neither committed nor rolled back.
    Prepared,
    /// A replication slot that is in use.
    Slot,
    /// A replication slot that is not in use.
    IdleSlot,
}

/// What holds back the horizon of VACUUM, so that PostgreSQL cannot remove finished rows.
#[derive(Clone, Debug)]
pub struct VacuumHolder {
    /// What it is.
    pub holding: HolderKind,
    /// The pid of a session or standby; the name of a prepared transaction or slot.
    pub name: String,
    /// Its `application_name`, if it is a session or standby.
    pub application: String,
    /// Its role, unless it is a slot.
    pub user: String,
    /// For how long it has held the horizon back; `None` = the server does not tell, or not to our role.
    pub age: Option<Duration>,
    /// How many transactions the horizon is behind.
    pub behind: i32,
}

/// The standbys of the server.
#[derive(Clone, Copy, Debug)]
pub struct Replication {
    /// How many stream from it now.
    pub standbys: i64,
    /// Whether a commit waits for one of them.
    pub is_synchronous: bool,
    /// Whether the URL names several servers, so that standbys are meant to be there.
    pub has_several_hosts: bool,
}

impl ServerVersion {
    /// Whether Tidings works with this release.
    #[must_use]
    pub fn is_supported(&self) -> bool {
        self.number >= OLDEST_SUPPORTED
    }
}

impl VacuumHolder {
    /// Whether a person ought to end it.
    #[must_use]
    pub fn is_too_long(&self) -> bool {
        match self.holding {
            HolderKind::Session | HolderKind::Prepared => self.age.is_some_and(|age| age > MAX_HOLD_AGE),
            HolderKind::Standby | HolderKind::Slot => self.behind > MAX_TRANSACTIONS_BEHIND,
            // It holds the horizon until it is used again or dropped.
            HolderKind::IdleSlot => true,
        }
    }
}

impl Store {
    /// Asks the server for its release.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn server_version(&self) -> Result<ServerVersion, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("report its version", async |connection| {
                sqlx::query_as!(
                    ServerVersion,
                    r#"
                    SELECT
                        current_setting('server_version_num')::int4 AS "number!",
                        current_setting('server_version') AS "text!"
                    "#
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Measures how long a notification takes from one connection to another; `None` = none arrived within 5 s.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn time_notification(&self) -> Result<Option<Duration>, StoreError> {
        let (mut listener, _) = self.listener(NOTIFY_DEADLINE).await?;
        run_bounded("listen for notifications", listener.listen(CHANNEL)).await?;
        // Tells our notification from that of another `tidings doctor`.
        let token = format!("{:016x}", fastrand::u64(..));
        let sent_at = Instant::now();
        let mut connection = self.connection().await?;
        connection
            .run("send a notification", async |connection| {
                sqlx::query!("SELECT pg_notify($1, $2)", CHANNEL, token).execute(connection).await
            })
            .await?;
        let arrived = tokio::time::timeout(NOTIFY_DEADLINE, async {
            loop {
                match listener.try_recv().await? {
                    Some(notification) if notification.payload() == token => return Ok(sent_at.elapsed()),
                    Some(_) => {}
                    None => return Err(sqlx::Error::Io(std::io::ErrorKind::ConnectionAborted.into())),
                }
            }
        });
        match arrived.await {
            Ok(arrived) => {
                arrived.map(Some).map_err(|source| StoreError::Statement { doing: "wait for a notification", source })
            }
            Err(_) => Ok(None),
        }
    }

    /// Measures how far this host's clock and the database's differ.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn clock_skew(&self) -> Result<Skew, StoreError> {
        let mut connection = self.connection().await?;
        let mut best: Option<Skew> = None;
        for _ in 0..READINGS {
            let (asked_at, sent) = (Instant::now(), OffsetDateTime::now_utc());
            let read = connection
                .run("read the clock", async |connection| {
                    sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(connection).await
                })
                .await?;
            let skew = skew_from_reading(sent, asked_at.elapsed(), read);
            best = Some(best.map_or(skew, |best| if skew.give_or_take < best.give_or_take { skew } else { best }));
        }
        Ok(best.expect("there is at least one reading"))
    }

    /// What holds back the horizon of VACUUM in this database at this moment, for however short a time, the oldest
    /// first.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn holders(&self) -> Result<Vec<VacuumHolder>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("list what holds back VACUUM", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        CASE WHEN backend_type = 'walsender' THEN 'standby' ELSE 'session' END AS "holding!",
                        pid::text AS "name!",
                        coalesce(application_name, '') AS "application!",
                        coalesce(usename::text, '') AS "user!",
                        extract(epoch FROM clock_timestamp() - xact_start)::float8 AS "seconds?",
                        greatest(age(backend_xmin), age(backend_xid)) AS "behind!"
                    FROM pg_stat_activity
                    WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
                        -- Snapshots of other databases hold nothing back here.
                        AND (datname = current_database() OR backend_type = 'walsender')
                        AND pid <> pg_backend_pid()
                        AND leader_pid IS NULL
                        -- VACUUM looks past itself.
                        AND pid NOT IN (SELECT pid FROM pg_stat_progress_vacuum)
                    UNION ALL
                    SELECT 'prepared', gid, '', owner::text,
                        extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)
                    FROM pg_prepared_xacts
                    WHERE database = current_database()
                    UNION ALL
                    SELECT CASE WHEN active THEN 'slot' ELSE 'idle slot' END, slot_name::text, '', '', NULL, age(xmin)
                    FROM pg_replication_slots
                    WHERE xmin IS NOT NULL
                    ORDER BY 5 DESC NULLS LAST, 6 DESC
                    LIMIT 1000
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let holders = rows.into_iter().map(|row| VacuumHolder {
            holding: match row.holding.as_str() {
                "standby" => HolderKind::Standby,
                "prepared" => HolderKind::Prepared,
                "slot" => HolderKind::Slot,
                "idle slot" => HolderKind::IdleSlot,
                _ => HolderKind::Session,
            },
            name: row.name,
            application: row.application,
            user: row.user,
            age: row.seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()),
            behind: row.behind,
        });
        Ok(holders.collect())
    }

    /// Tells about the server's standbys.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn replication(&self) -> Result<Replication, StoreError> {
        let has_several_hosts = self.servers.has_several_hosts();
        let mut connection = self.connection().await?;
        connection
            .run("tell about its standbys", async |connection| {
                let row = sqlx::query!(
                    r#"
                    SELECT
                        (SELECT count(*) FROM pg_stat_replication) AS "standbys!",
                        current_setting('synchronous_standby_names') <> ''
                            AND current_setting('synchronous_commit') NOT IN ('off', 'local') AS "is_synchronous!"
                    "#
                );
                let row = row.fetch_one(connection).await?;
                Ok(Replication { standbys: row.standbys, is_synchronous: row.is_synchronous, has_several_hosts })
            })
            .await
    }

    /// How full the server's queue of notifications is, from 0 to 1; and, if it is more than half full, the session
    /// with the oldest transaction. PostgreSQL does not tell which session listens, but one that keeps the queue from
    /// shrinking is in a transaction.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn notification_queue(&self) -> Result<(f64, Option<String>), StoreError> {
        let mut connection = self.connection().await?;
        let row = connection
            .run("measure the queue of notifications", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT used AS "used!", (
                        SELECT format('pid %s (%s, user %s, database %s)', pid, application_name, usename, datname)
                        FROM pg_stat_activity
                        -- The queue is the whole server's.
                        WHERE used > 0.5 AND xact_start IS NOT NULL AND backend_type = 'client backend'
                            AND pid <> pg_backend_pid()
                        ORDER BY xact_start
                        LIMIT 1
                    ) AS "oldest?"
                    FROM pg_notification_queue_usage() AS used
                    "#
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        Ok((row.used, row.oldest))
    }
}

/// Compares this host's clock with a reading of the database's, which was asked for at `sent` and took `round_trip`.
fn skew_from_reading(sent: OffsetDateTime, round_trip: Duration, read: OffsetDateTime) -> Skew {
    let half = round_trip / 2;
    Skew { ahead: sent + half - read, give_or_take: half }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(holding: HolderKind, age_seconds: Option<u64>, behind: i32) -> VacuumHolder {
        let age = age_seconds.map(Duration::from_secs);
        VacuumHolder { holding, name: "7".into(), application: String::new(), user: String::new(), age, behind }
    }

    #[test]
    fn the_clock_is_taken_to_be_read_half_a_round_trip_after_the_question() {
        let sent = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(10);
        let ahead = |read_ms| {
            let read = OffsetDateTime::UNIX_EPOCH + Duration::from_millis(read_ms);
            skew_from_reading(sent, Duration::from_millis(40), read).ahead
        };
        assert_eq!(ahead(10_020), time::Duration::ZERO);
        assert_eq!(ahead(8_020), time::Duration::seconds(2));
        assert_eq!(ahead(11_020), time::Duration::seconds(-1));
        let give_or_take = skew_from_reading(sent, Duration::from_millis(40), sent).give_or_take;
        assert_eq!(give_or_take, Duration::from_millis(20));
    }

    #[test]
    fn a_session_or_prepared_transaction_holds_too_long_after_five_minutes_if_its_age_is_known() {
        for holding in [HolderKind::Session, HolderKind::Prepared] {
            assert!(!holder(holding, Some(300), i32::MAX).is_too_long());
            assert!(holder(holding, Some(301), 0).is_too_long());
            assert!(!holder(holding, None, i32::MAX).is_too_long());
        }
    }

    #[test]
    fn a_slot_holds_too_long_if_it_is_idle_or_far_behind() {
        for holding in [HolderKind::Slot, HolderKind::Standby] {
            assert!(!holder(holding, None, 1_000_000).is_too_long());
            assert!(holder(holding, None, 1_000_001).is_too_long());
        }
        assert!(holder(HolderKind::IdleSlot, None, 0).is_too_long());
    }

    #[test]
    fn releases_from_15_on_are_supported() {
        let version = |number| ServerVersion { number, text: String::new() };
        assert!(!version(140_020).is_supported());
        assert!(version(150_000).is_supported() && version(180_001).is_supported());
    }
}
