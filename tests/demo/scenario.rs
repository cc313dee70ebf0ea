//! The application of the demo: a table of games, and the changes that its users make.

use anyhow::ensure;
use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};
use uuid::Uuid;

use crate::Announced;

/// The SQL that creates the table of games and its triggers.
const GAMES: &str = include_str!("games.sql");

/// Creates the table of games, in place of that of an earlier demo.
pub(super) async fn create_games_table(db: &mut PgConnection) -> anyhow::Result<()> {
    db.execute("DROP TABLE IF EXISTS games; DROP FUNCTION IF EXISTS minutes, schedule_game, cancel_game").await?;
    db.execute(GAMES).await?;
    Ok(())
}

/// Creates games, moves one, deletes one, and rolls one back. Returns the messages that must arrive.
pub(super) async fn play(db: &mut PgConnection) -> anyhow::Result<Announced> {
    println!(
        "creating the game 'Friday chess', which starts in 9 s, with reminders 60 and 15 'minutes' ahead (6 s and 1.5 s)"
    );
    db.execute("INSERT INTO games (title, starts_at) VALUES ('Friday chess', now() + interval '9 seconds')").await?;
    println!("creating the game 'Saturday go', which starts in 8 s, with its reminders");
    db.execute("INSERT INTO games (title, starts_at) VALUES ('Saturday go', now() + interval '8 seconds')").await?;
    let before = pending_rows(db).await?;

    println!("moving 'Friday chess' to 1 s earlier: all its rows are rescheduled, with new ids");
    db.execute("UPDATE games SET starts_at = starts_at - interval '1 second' WHERE title = 'Friday chess'").await?;
    println!("deleting 'Saturday go': all its rows are cancelled");
    db.execute("DELETE FROM games WHERE title = 'Saturday go'").await?;
    println!("creating 'Sunday bridge' and rolling it back: nothing is scheduled");
    let mut transaction = db.begin().await?;
    transaction
        .execute("INSERT INTO games (title, starts_at) VALUES ('Sunday bridge', now() + interval '1 second')")
        .await?;
    transaction.rollback().await?;
    println!("scheduling a row of the kind 'message', due at once, for which there is no plugin yet");
    db.execute(
        r#"SELECT tidings.schedule('message', now(),
           '{"routing_key": "demo.hello", "body": {"hello": "world"}}', key => 'hello')"#,
    )
    .await?;

    let announced = pending_rows(db).await?;
    ensure!(announced.len() == 5, "two reminders, two status changes and a message are pending, not {announced:?}");
    ensure!(
        before.len() == 8 && before.keys().all(|id| !announced.contains_key(id)),
        "every row of the games has a new id"
    );
    Ok(announced)
}

/// The pending rows: their ids, each with a description.
async fn pending_rows(db: &mut PgConnection) -> anyhow::Result<Announced> {
    let rows =
        db.fetch_all("SELECT id, kind, key, due_at - now() AS due_in FROM tidings.schedules ORDER BY due_at").await?;
    let mut pending = Announced::new();
    for row in rows {
        let id: Uuid = row.get("id");
        pending.insert(id, format!("{id}  {:<14} {}", row.get::<&str, _>("kind"), row.get::<&str, _>("key")));
    }
    Ok(pending)
}

/// Checks that no row is pending and that the history has all five rows as delivered.
pub(super) async fn check_all_delivered(db: &mut PgConnection) -> anyhow::Result<()> {
    // A consumer may receive a message a moment before the daemon commits the row as delivered.
    testkit::eventually("the last commit", async || {
        let left = db.fetch_one("SELECT count(*) FROM tidings.schedules").await.ok()?;
        (left.get::<i64, _>(0) == 0).then_some(())
    })
    .await;
    let row = db
        .fetch_one(
            "SELECT count(*) AS rows, count(*) FILTER (WHERE outcome = 'delivered' AND finished_at >= due_at) AS delivered,
                    (extract(epoch FROM max(finished_at - due_at) FILTER (WHERE kind <> 'message')) * 1000)::float8 AS latest_ms FROM tidings.deliveries",
        )
        .await?;
    let (rows, delivered): (i64, i64) = (row.get("rows"), row.get("delivered"));
    println!(
        "tidings.schedules is empty; tidings.deliveries has {delivered} rows, confirmed at most {:.1} ms after they were due (except the one that waited for its plugin)",
        row.get::<f64, _>("latest_ms")
    );
    ensure!(rows == 5 && delivered == 5, "the history has {rows} rows, of which {delivered} were delivered");
    Ok(())
}
