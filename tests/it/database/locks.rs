//! Migrations that need a table for themselves for a moment: a long reader delays them, and they delay everybody else briefly.

use harness::world::World;
use sqlx::{AssertSqlSafe, Executor as _};

use crate::database::platforms::launch_migrate;
use crate::database::upgrade::go_back_to;

/// Migrates while a long transaction has read the table, and checks that `write`, which needs the table meanwhile, waits for the
/// migration's lock for half a second at most.
async fn migrate_beside_a_reader(world: &World, table: &str, write: &str) {
    let mut reader = world.db.begin().await.expect("a transaction");
    reader.execute(AssertSqlSafe(format!("SELECT FROM {table}"))).await.expect("read");
    let mut migrating = launch_migrate(world, "postgres").start();
    world
        .wait_until(&format!(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass)"
        ))
        .await;

    let mut writer = world.db.begin().await.expect("a transaction");
    writer.execute("SET LOCAL lock_timeout = '10s'").await.expect("set");
    writer.execute(AssertSqlSafe(write.to_owned())).await.expect("written");
    writer.commit().await.expect("written");
    reader.commit().await.expect("read");
    assert!(migrating.wait_for_end().await.success(), "{}", migrating.log());
}

#[tokio::test]
async fn the_history_gets_its_replica_identity_despite_a_long_reader_and_delays_writers_briefly() {
    let world = World::empty().await;
    world.sql("ALTER TABLE tidings.deliveries REPLICA IDENTITY DEFAULT").await;
    world.sql("DELETE FROM tidings._sqlx_migrations WHERE version = 12").await;
    let write = "INSERT INTO tidings.deliveries (id, kind, due_at, finished_at, outcome, attempts, payload, headers)
        VALUES (gen_random_uuid(), 'a', now(), now(), 'delivered', 1, '{}', '{}')";
    migrate_beside_a_reader(&world, "tidings.deliveries", write).await;
    assert!(
        world.value::<bool>("SELECT relreplident = 'f' FROM pg_class WHERE oid = 'tidings.deliveries'::regclass").await
    );
}

#[tokio::test]
async fn the_rule_about_headers_is_replaced_despite_a_long_reader_and_delays_producers_briefly() {
    let world = World::empty().await;
    go_back_to(&world, 12).await;
    let rule = "headers must be an object of strings, 16 KiB together";
    world.sql(r#"SELECT tidings.schedule('a', now() + interval '1 hour', headers => '{"h": "v"}')"#).await;
    let write = "SELECT tidings.schedule('a', now() + interval '1 hour')";
    migrate_beside_a_reader(&world, "tidings.schedules", write).await;
    let validated = format!("SELECT convalidated FROM pg_constraint WHERE conname = '{rule}'");
    assert!(world.value::<bool>(&validated).await);
    let error = world.expect_error(r#"SELECT tidings.schedule('a', now(), headers => '{"h": 1}')"#).await;
    assert!(error.contains(rule), "{error}");
}

#[tokio::test]
async fn the_columns_of_occurrences_are_added_despite_a_long_reader_and_delay_producers_briefly() {
    let world = World::empty().await;
    go_back_to(&world, 15).await;
    let write = "SELECT tidings.schedule('a', now() + interval '1 hour')";
    migrate_beside_a_reader(&world, "tidings.schedules", write).await;
    assert!(world.value::<bool>("SELECT bool_and(recurrence IS NULL) FROM tidings.schedules").await);
}
