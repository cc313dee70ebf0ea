//! Parked rows, for people: lists them, puts them back into the queue, or removes them for good.

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::store::{Store, StoreError};

/// A parked row.
#[derive(Clone, Debug, Serialize)]
pub struct ParkedRow {
    /// Its id, the same as before it was parked.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// The key that it had, if it had one.
    pub key: Option<String>,
    /// `name@version+digest8` of the plugin that was called, if one was.
    pub plugin: Option<String>,
    /// When it was parked.
    #[serde(with = "time::serde::rfc3339")]
    pub parked_at: OffsetDateTime,
    /// Why.
    pub reason: String,
}

impl Store {
    /// Lists every parked row, the one that was parked first at the beginning.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn parked(&self) -> Result<Vec<ParkedRow>, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("list parked rows", async |connection| {
                sqlx::query_as!(
                    ParkedRow,
                    "SELECT id, kind, key, plugin, parked_at, reason FROM tidings.parked ORDER BY parked_at, id"
                )
                .fetch_all(connection)
                .await
            })
            .await
    }

    /// Lists the parked rows that were scheduled last, the newest first, with the first 1,000 characters of their
    /// reasons.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn newest_parked(&self, limit: i64) -> Result<Vec<ParkedRow>, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("list the newest parked rows", async |connection| {
                // By id, which begins with the time of scheduling: of these columns only the id has an index.
                sqlx::query_as!(
                    ParkedRow,
                    r#"
                    SELECT id, kind, key, plugin, parked_at, left(reason, 1000) AS "reason!"
                    FROM tidings.parked
                    ORDER BY id DESC
                    LIMIT $1
                    "#,
                    limit,
                )
                .fetch_all(connection)
                .await
            })
            .await
    }

    /// Lists the ids of the parked rows that were scheduled first.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn parked_ids(&self, limit: i64) -> Result<Vec<Uuid>, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("list the ids of parked rows", async |connection| {
                sqlx::query_scalar!("SELECT id FROM tidings.parked ORDER BY id LIMIT $1", limit)
                    .fetch_all(connection)
                    .await
            })
            .await
    }

    /// Puts these parked rows back into the queue, due now. Returns how many there were. Either all go back or none.
    ///
    /// # Errors
    ///
    /// When the database cannot do it, for instance since a key is taken by now.
    pub async fn unpark(&self, ids: &[Uuid]) -> Result<usize, StoreError> {
        let mut connection = self.connection().await?;
        let done = connection
            .run("put parked rows back", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT unparked.done AS "done!"
                    FROM (
                        SELECT count(*) FILTER (WHERE tidings.unpark(id)) AS done FROM unnest($1::uuid[]) AS id
                    ) AS unparked,
                        -- The triggers say nothing of what our own sessions do.
                        pg_notify('tidings', '')
                    "#,
                    ids
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        Ok(usize::try_from(done).unwrap_or(0))
    }

    /// Removes these parked rows for good. Returns how many there were.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn drop_parked(&self, ids: &[Uuid]) -> Result<usize, StoreError> {
        let mut connection = self.connection().await?;
        let done = connection
            .run("drop parked rows", async |connection| {
                sqlx::query!("DELETE FROM tidings.parked WHERE id = ANY($1)", ids).execute(connection).await
            })
            .await?;
        Ok(usize::try_from(done.rows_affected()).unwrap_or(0))
    }
}
