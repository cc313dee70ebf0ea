//! Schedules the canary as an application would: with a notification, which the triggers otherwise omit for the
//! daemon's statements.

use std::time::Duration;

use uuid::Uuid;

use crate::store::{Store, StoreError};

impl Store {
    /// Writes a row of the kind `message` for `routing_key` that is due in `ahead` and expires in `life`, both from
    /// now. Returns its id.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn schedule_canary(
        &self,
        routing_key: &str,
        ahead: Duration,
        life: Duration,
    ) -> Result<Uuid, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("schedule the canary", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH notified AS (SELECT set_config('tidings.notify', 'on', true))
                    INSERT INTO tidings.schedules (kind, subject, due_at, expires_at, payload)
                    SELECT
                        'message',
                        'tidings.canary',
                        clock_timestamp() + $2 * interval '1 second',
                        clock_timestamp() + $3 * interval '1 second',
                        jsonb_build_object('routing_key', $1::text, 'body', 'canary')
                    FROM notified
                    RETURNING id AS "id!"
                    "#,
                    routing_key,
                    ahead.as_secs_f64(),
                    life.as_secs_f64(),
                )
                .fetch_one(connection)
                .await
            })
            .await
    }
}
