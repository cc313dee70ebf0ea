//! Retention of `tidings.deliveries`. It never touches a row that waits or is parked.

use std::time::Duration;

use super::{Store, StoreError};

/// Rows that are removed by one statement: few enough that nobody waits for it.
const BATCH: i64 = 10_000;

impl Store {
    /// Removes history that is older than `age`. Several daemons may do it at once.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn remove_history(&self, age: Duration) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let mut connection = self.connection().await?;
            let answer = connection
                .run("remove old history", async |connection| {
                    sqlx::query!(
                        r#"
                        DELETE FROM tidings.deliveries
                        WHERE ctid = ANY (ARRAY(
                            SELECT ctid
                            FROM tidings.deliveries
                            WHERE finished_at < statement_timestamp() - $1::float8 * interval '1 second'
                            LIMIT $2
                            FOR UPDATE SKIP LOCKED
                        ))
                        "#,
                        age.as_secs_f64(),
                        BATCH,
                    )
                    .execute(connection)
                    .await
                })
                .await?;
            removed += answer.rows_affected();
            if answer.rows_affected() < BATCH.unsigned_abs() {
                return Ok(removed);
            }
        }
    }
}
