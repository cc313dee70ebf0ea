//! `tidings.parked`, for people: what lies there, back into the queue, or gone for good.

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError};

/// A row that was set aside.
#[derive(Clone, Debug, Serialize)]
pub struct ParkedRow {
    /// Its id, as ever.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// When it was set aside.
    #[serde(with = "time::serde::rfc3339")]
    pub parked_at: OffsetDateTime,
    /// Why.
    pub reason: String,
}

impl Store {
    /// Every parked row, the oldest first.
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
                    "SELECT id, kind, parked_at, reason FROM tidings.parked ORDER BY parked_at, id"
                )
                .fetch_all(connection)
                .await
            })
            .await
    }

    /// Puts these parked rows back into the queue, due now. Returns how many there were. Either all go back or none: a key
    /// may be taken by now.
    ///
    /// # Errors
    ///
    /// When the database cannot do it, with its sentence.
    pub async fn unpark(&self, ids: &[Uuid]) -> Result<usize, StoreError> {
        let mut connection = self.connection().await?;
        let done = connection
            .run("put parked rows back", async |connection| {
                sqlx::query_scalar!(
                    r#"SELECT count(*) FILTER (WHERE tidings.unpark(id)) AS "done!" FROM unnest($1::uuid[]) AS id"#,
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
