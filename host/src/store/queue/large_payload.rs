//! Payloads that are too large for a claim of several rows. They are read in pieces up to 32 MiB of JSON text; rows
//! with longer ones are parked.
//!
//! PostgreSQL can store some payloads that it cannot write as JSON text, since the text would be longer than a
//! gigabyte: a few kilobytes of numbers such as 1e100000 are enough. A claim fails as a whole if one of its rows has
//! such a payload.

use futures_util::TryStreamExt as _;
use uuid::Uuid;

use crate::store::queue::claim::Transaction;
use crate::store::{Store, StoreError};

/// The longest payload that is read, in bytes of JSON text. The table accepts 16 MiB in PostgreSQL's own form, and most
/// of those are no longer than this as text. But control characters take six times as much as text, and numbers any
/// multiple.
const MAX_TEXT_BYTES: i32 = 32 * 1024 * 1024;
/// How much is read at a time: the client library holds up to four times as much for each row of an answer.
const PIECE_BYTES: i32 = 1024 * 1024;

impl Transaction {
    /// Reads the payload of a row that this transaction has locked, as JSON text; `None` = it is longer than allowed.
    pub(in crate::store) async fn read_large(&mut self, id: Uuid) -> Result<Option<String>, StoreError> {
        let text =
            self.connection.run("read a large payload", async |connection| read_pieces(connection, id).await).await?;
        Ok(String::from_utf8(text).ok().filter(|text| !text.is_empty()))
    }
}

async fn read_pieces(connection: &mut sqlx::PgConnection, id: Uuid) -> Result<Vec<u8>, sqlx::Error> {
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
        MAX_TEXT_BYTES,
        PIECE_BYTES,
    )
    .fetch(connection);
    let size = |number: i32| usize::try_from(number).expect("sizes and positions are not negative");
    let mut text = Vec::new();
    while let Some(row) = pieces.try_next().await? {
        text.resize(size(row.bytes), 0);
        let begin = size((row.number - 1) * PIECE_BYTES);
        text[begin..begin + row.piece.len()].copy_from_slice(&row.piece);
    }
    Ok(text)
}

impl Store {
    /// Parks the first due row whose payload PostgreSQL cannot write as text. Called when a claim failed for lack of
    /// memory. If that was the server's own shortage, no such row is found.
    pub(in crate::store) async fn park_unreadable(&self) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        // 2,000 rows are more than the failed claim and those of the other lanes ahead of it had. A payload whose text
        // is that long takes at least a kilobyte as it is stored.
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
            match connection.run("read a payload", async |connection| write_as_text(connection, id).await).await {
                Ok(()) => {}
                Err(error) if error.is_out_of_memory() => {
                    // On another connection: the one with the error is closed.
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

/// Makes PostgreSQL write the row's payload as text, which fails if it cannot.
async fn write_as_text(connection: &mut sqlx::PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    let length = sqlx::query_scalar!("SELECT octet_length(payload::text) FROM tidings.schedules WHERE id = $1", id);
    length.fetch_optional(connection).await.map(drop)
}
