//! Pauses and resumes kinds, in `tidings.pauses`, and notifies, so that all daemons look at once. What a pause does to
//! the rows of its kind is in `queue/kinds.rs`.

use std::time::Duration;

use time::OffsetDateTime;

use crate::model::row_status::Pause;
use crate::store::{Store, StoreError};

/// When a pause ends by itself.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// Never: it ends when a person resumes the kind.
    Resumed,
    /// At this instant.
    At(OffsetDateTime),
    /// This long from now, by the database clock.
    After(Duration),
}

impl Store {
    /// Pauses a kind, or changes its pause. From the commit on no daemon claims a row of the kind.
    ///
    /// # Errors
    ///
    /// When the database cannot do it, or a value breaks a rule of the schema.
    pub async fn pause(&self, kind: &str, until: Until, reason: Option<&str>) -> Result<Pause, StoreError> {
        let (until, seconds) = match until {
            Until::Resumed => (None, None),
            Until::At(at) => (Some(at), None),
            Until::After(time) => (None, Some(time.as_secs_f64())),
        };
        let mut connection = self.connection().await?;
        connection
            .run("pause a kind", async |connection| {
                sqlx::query_as!(
                    Pause,
                    r#"
                    WITH ended AS (
                        DELETE FROM tidings.pauses WHERE until <= statement_timestamp() AND kind <> $1
                    ), paused AS (
                        INSERT INTO tidings.pauses AS paused (kind, since, until, reason)
                        VALUES (
                            $1, statement_timestamp(),
                            coalesce($2, statement_timestamp() + $3::float8 * interval '1 second'), $4
                        )
                        ON CONFLICT (kind) DO UPDATE
                        SET since = excluded.since, until = excluded.until, reason = excluded.reason, by = session_user
                        RETURNING paused.*
                    )
                    SELECT kind, since, until, reason, by FROM paused, pg_notify('tidings', '')
                    "#,
                    kind,
                    until,
                    seconds,
                    reason,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Resumes a kind. Returns whether it was paused.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn resume(&self, kind: &str) -> Result<bool, StoreError> {
        let mut connection = self.connection().await?;
        let resumed = connection
            .run("resume a kind", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH resumed AS (
                        DELETE FROM tidings.pauses WHERE kind = $1
                        RETURNING (until <= statement_timestamp()) IS NOT TRUE AS was_paused
                    )
                    SELECT was_paused AS "was_paused!" FROM resumed, pg_notify('tidings', '')
                    "#,
                    kind,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        Ok(resumed.unwrap_or(false))
    }

    /// Lists the pauses that have not ended, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn pauses(&self) -> Result<Vec<Pause>, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("list the pauses", async |connection| {
                sqlx::query_as!(
                    Pause,
                    r#"
                    SELECT kind AS "kind!", since AS "since!", until, reason, by AS "by!"
                    FROM tidings.paused
                    ORDER BY kind
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await
    }
}
