//! Promises to look at the queue without being notified (`host/core/src/polling.rs`).

use tidings_core::queue::PROMISE;

/// Promises that every daemon looks at the queue every few milliseconds for [`PROMISE`], so that nobody needs to notify. The
/// others are notified of it: each of them may be the only one that serves its kinds, and this one may die the next moment.
///
/// # Errors
///
/// When the database cannot do it.
pub(crate) async fn promise_to_poll(connection: impl sqlx::PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "SELECT
            setval('tidings.polling_until', ((extract(epoch FROM clock_timestamp()) + $1::float8) * 1e6)::bigint),
            pg_notify('tidings', '')",
        PROMISE.as_secs_f64(),
    )
    .fetch_one(connection)
    .await
    .map(drop)
}
