//! Promises to look at the queue without being notified (`polling.rs`).

use crate::polling::PROMISE;

/// Promises that whoever sees it looks at the queue every few milliseconds for [`PROMISE`], so that nobody needs to notify.
///
/// # Errors
///
/// When the database cannot do it.
pub(crate) async fn promise_to_poll(connection: impl sqlx::PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "SELECT setval('tidings.polling_until', ((extract(epoch FROM clock_timestamp()) + $1::float8) * 1e6)::bigint)",
        PROMISE.as_secs_f64(),
    )
    .fetch_one(connection)
    .await
    .map(drop)
}
