//! Upgrades of a database that an earlier release migrated and filled.

use harness::world::World;
use sqlx::{AssertSqlSafe, Executor as _};

use crate::database::platforms::{create_role, database_url_of};

/// The last migration of the release before recurrences.
const BEFORE_RECURRENCES: i64 = 15;
/// The last migration of the release before priorities.
const BEFORE_PRIORITIES: i64 = 21;

/// Makes the schema of a world that of an earlier release.
pub(crate) async fn go_back_to(world: &World, version: i64) {
    world
        .db
        .execute(
            "CREATE TABLE records (LIKE tidings._sqlx_migrations INCLUDING ALL);
             INSERT INTO records SELECT * FROM tidings._sqlx_migrations;
             DROP SCHEMA tidings CASCADE;
             CREATE SCHEMA tidings;
             CREATE TABLE tidings._sqlx_migrations (LIKE records INCLUDING ALL)",
        )
        .await
        .expect("the schema is empty");
    let mut files: Vec<_> = std::fs::read_dir(harness::repository().join("migrations"))
        .expect("the migrations")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    files.sort();
    let count = usize::try_from(version).expect("a number");
    for file in &files[..count] {
        let sql = std::fs::read_to_string(file).expect("a file");
        let mut transaction = world.db.begin().await.expect("begun");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *transaction).await.expect("migrated");
        transaction.commit().await.expect("committed");
    }
    world.sql(&format!("INSERT INTO tidings._sqlx_migrations SELECT * FROM records WHERE version <= {version}")).await;
}

#[tokio::test]
async fn an_upgrade_keeps_pending_rows_and_grants_and_what_is_built_upon_the_functions() {
    let rows: u32 = std::env::var("HARNESS_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(50_000);
    let world = World::with_plugins(&["message"]).await;
    go_back_to(&world, BEFORE_RECURRENCES).await;
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
               SELECT 'message', 'k' || n, now() + interval '1 day', '{{"routing_key": "a", "body": 1}}'
               FROM generate_series(1, {rows}) AS n"#
        ))
        .await;
    let shop = create_role(&world, "shop", "").await;
    world
        .db
        .execute(AssertSqlSafe(format!(
            "GRANT USAGE ON SCHEMA tidings TO {shop};
             GRANT EXECUTE ON FUNCTION tidings.schedule TO {shop};
             CREATE FUNCTION remind(who text) RETURNS uuid LANGUAGE sql SECURITY DEFINER
                BEGIN ATOMIC SELECT tidings.schedule('message', now() + interval '1 day', key => who); END;
             GRANT EXECUTE ON FUNCTION remind TO {shop}"
        )))
        .await
        .expect("granted");
    let digest =
        "SELECT md5(string_agg(id::text || due_at || payload || slot_at, '' ORDER BY id)) FROM tidings.schedules";
    let before: String = world.value(digest).await;

    let begun = std::time::Instant::now();
    let (code, output) = world.launch().subcommand("migrate").run_to_end().await;

    assert_eq!(code, 0, "{output}");
    println!("{rows} pending rows: migrated in {:?}", begun.elapsed());
    assert_eq!(world.value::<String>(digest).await, before);
    let (code, report) = world.launch().subcommand("doctor").run_to_end().await;
    assert!(report.contains("triggers") && !report.contains("missing"), "{code} {report}");

    // The role may still call the function, with and without what is new, and what was built upon it.
    let client = sqlx::PgPool::connect(&database_url_of(&world, &shop)).await.expect("connected");
    for call in [
        "SELECT tidings.schedule('message', now() + interval '1 day', key => 'plain')",
        "SELECT tidings.schedule('message', now() + interval '1 day', key => 'spread', spread => '1 hour')",
        "SELECT remind('built')",
    ] {
        client.execute(call).await.unwrap_or_else(|error| panic!("{call}: {error}"));
    }
    let found = "SELECT count(*) FROM tidings.schedules WHERE key IN ('plain', 'spread', 'built')";
    assert_eq!(world.value::<i64>(found).await, 3);
    let mut inbox = world.inbox(&["a"]).await;
    let _daemon = world.start_daemon().await;
    world.sql("UPDATE tidings.schedules SET due_at = now() WHERE key = 'k1'").await;
    assert_eq!(inbox.next().await.headers()["tidings-key"], "k1");
}

#[tokio::test]
async fn an_upgrade_keeps_recurrences_and_who_may_make_them_and_what_is_built_upon_the_function() {
    let world = World::empty().await;
    go_back_to(&world, BEFORE_PRIORITIES).await;
    let shop = create_role(&world, "shop", "").await;
    world
        .db
        .execute(AssertSqlSafe(format!(
            "SELECT tidings.repeat('before', 'message', 'every 1 hour');
             GRANT USAGE ON SCHEMA tidings TO {shop};
             GRANT EXECUTE ON FUNCTION tidings.repeat TO {shop};
             CREATE FUNCTION every_hour(name text) RETURNS timestamptz LANGUAGE sql SECURITY DEFINER
                BEGIN ATOMIC SELECT tidings.repeat(name, 'message', 'every 1 hour', max_count => 3); END;
             GRANT EXECUTE ON FUNCTION every_hour TO {shop}"
        )))
        .await
        .expect("granted");

    let (code, output) = world.launch().subcommand("migrate").run_to_end().await;

    assert_eq!(code, 0, "{output}");
    let client = sqlx::PgPool::connect(&database_url_of(&world, &shop)).await.expect("connected");
    for call in [
        "SELECT tidings.repeat('plain', 'message', 'every 1 hour')",
        "SELECT tidings.repeat('urgent', 'message', 'every 1 hour', priority => 9)",
        "SELECT every_hour('built')",
    ] {
        client.execute(call).await.unwrap_or_else(|error| panic!("{call}: {error}"));
    }
    let found =
        "SELECT string_agg(concat_ws(' ', name, priority, max_count), ', ' ORDER BY name) FROM tidings.recurrences";
    assert_eq!(world.value::<String>(found).await, "before 4, built 4 3, plain 4, urgent 9");
}
