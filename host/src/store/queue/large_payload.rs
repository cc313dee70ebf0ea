//! Payloads that are too large for a claim of several rows: read in pieces, or not at all.
//!
//! Some PostgreSQL itself has stored and cannot write as JSON text, since that would be longer than a gigabyte: a few kilobytes
//! of numbers such as 1e100000 are enough. A claim that meets one fails as a whole.

use futures_util::TryStreamExt as _;
use uuid::Uuid;

use crate::store::queue::claim::Transaction;
use crate::store::{Store, StoreError};

/// A payload that is longer as JSON text is not read. Most that the table takes, of 16 MiB in PostgreSQL's own form, are no
/// longer than that; but one of control characters has six times as much, and one of numbers any number.
const LONGEST_TEXT: i32 = 32 * 1024 * 1024;
/// The client library holds up to four times as much of an answer's row.
const PIECE: i32 = 1024 * 1024;

impl Transaction {
    /// The payload of a row that we have locked, as JSON text; `None` = it is longer than is allowed.
    pub(in crate::store) async fn read_large(&mut self, id: Uuid) -> Result<Option<String>, StoreError> {
        let text = self.connection.run("read a large payload", async |connection| pieces(connection, id).await).await?;
        Ok(String::from_utf8(text).ok().filter(|text| !text.is_empty()))
    }
}

async fn pieces(connection: &mut sqlx::PgConnection, id: Uuid) -> Result<Vec<u8>, sqlx::Error> {
    let mut pieces = sqlx::query!(
        r#"
        SELECT number AS "number!", octet_length(text) AS "bytes!", substring(text FROM (number - 1) * $3 + 1 FOR $3) AS "piece!"
        FROM (
            -- As bytes, of which a piece is found without counting characters; and once.
            SELECT convert_to(payload::text, 'UTF8') AS text FROM tidings.schedules WHERE id = $1 OFFSET 0
        ) AS whole
        CROSS JOIN LATERAL
            generate_series(1, CASE WHEN octet_length(text) <= $2 THEN (octet_length(text) - 1) / $3 + 1 END) AS number
        "#,
        id,
        LONGEST_TEXT,
        PIECE,
    )
    .fetch(connection);
    let size = |number: i32| usize::try_from(number).expect("counted from one");
    let mut text = Vec::new();
    while let Some(row) = pieces.try_next().await? {
        text.resize(size(row.bytes), 0);
        let begin = size((row.number - 1) * PIECE);
        text[begin..begin + row.piece.len()].copy_from_slice(&row.piece);
    }
    Ok(text)
}

impl Store {
    /// Parks the first due row whose payload cannot be written, if there is one. Called when a claim has failed for want of
    /// memory, which may be the server's own as well; then nothing is found.
    pub(in crate::store) async fn park_unreadable(&self) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        // A claim has few rows, behind those that other lanes have; as it is stored, what is so long has a kilobyte at least.
        let suspects = connection
            .run("look for a payload that cannot be read", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT id
                    FROM tidings.schedules
                    WHERE slot_at <= statement_timestamp() AND pg_column_size(payload) > 1000
                    ORDER BY slot_at
                    LIMIT 2000
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        for id in suspects {
            match connection.run("read a payload", async |connection| readable(connection, id).await).await {
                Ok(()) => {}
                Err(error) if error.is_out_of_memory() => {
                    // The connection that met an error is given up.
                    let mut transaction = Transaction::begin(self.connection().await?).await?;
                    transaction.park(id, "PostgreSQL cannot write its payload as JSON text, which is too long").await?;
                    return transaction.end("COMMIT").await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn readable(connection: &mut sqlx::PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    let length = sqlx::query_scalar!("SELECT octet_length(payload::text) FROM tidings.schedules WHERE id = $1", id);
    length.fetch_optional(connection).await.map(drop)
}
