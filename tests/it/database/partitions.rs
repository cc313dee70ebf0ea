//! `tidings migrate --partitions`: the table of rows in partitions does what the plain table does. All tests of behaviour run on
//! partitions with `HARNESS_PARTITIONS=4`.

use harness::world::World;
use lapin::options::BasicAckOptions;
use sqlx::{AssertSqlSafe, Executor as _};
use uuid::Uuid;

use crate::database::platforms::{create_role, database_url_of};

const MESSAGE: &str = r#"'{"routing_key": "a", "body": 1}'"#;
/// A digest of all rows, of a plain table and of partitions.
const DIGEST: &str = "SELECT md5(string_agg(schedules::text, '' ORDER BY id)) FROM tidings.schedules";
const COUNT: &str = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'tidings.schedules'::regclass";

async fn partition(world: &World, partitions: u32) -> (i32, String) {
    world.launch().subcommand("migrate").args(["--partitions", &partitions.to_string()]).run_to_end().await
}

async fn partition_well(world: &World, partitions: u32) -> String {
    let (code, output) = partition(world, partitions).await;
    assert_eq!(code, 0, "{output}");
    output
}

/// Everything that the table has beside its rows, with which the plain table is compared.
const FORM: &str = "
    SELECT concat_ws(
        E'\n',
        (SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull, attgenerated, attacl,
                pg_get_expr(adbin, adrelid), col_description(attrelid, attnum)), E'\n' ORDER BY attname)
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = 'tidings.schedules'::regclass AND attnum > 0 AND NOT attisdropped),
        (SELECT string_agg(conname || pg_get_constraintdef(oid), E'\n' ORDER BY conname) FROM pg_constraint
            WHERE conrelid = 'tidings.schedules'::regclass AND contype = 'c'),
        (SELECT string_agg(pg_get_triggerdef(oid), E'\n' ORDER BY tgname) FROM pg_trigger
            WHERE tgrelid = 'tidings.schedules'::regclass),
        (SELECT string_agg(relname, E'\n' ORDER BY relname) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
            WHERE indrelid = 'tidings.schedules'::regclass AND NOT indisprimary AND indisvalid),
        (SELECT concat_ws(' ', relacl, relowner, relrowsecurity, relforcerowsecurity, obj_description(oid)) FROM pg_class
            WHERE oid = 'tidings.schedules'::regclass),
        (SELECT string_agg(DISTINCT class.reloptions::text || toast.reloptions::text, E'\n')
            FROM pg_class AS class JOIN pg_class AS toast ON toast.oid = class.reltoastrelid
            WHERE class.relkind = 'r' AND class.relname ~ '^schedules')
    )";

#[tokio::test]
async fn rows_move_into_partitions_and_back_and_keep_all_that_they_have() {
    let world = World::with_plugins(&["message"]).await;
    partition_well(&world, 1).await;
    let shop = create_role(&world, "shop", "").await;
    world
        .db
        .execute(AssertSqlSafe(format!(
            "INSERT INTO tidings.schedules (kind, key, subject, due_at, payload, headers, attempts, held)
             SELECT 'message', nullif('k' || n, 'k' || n / 2 * 2), 's', now() + interval '1 day', {MESSAGE}, '{{\"a\": \"b\"}}', n, n % 7 = 0
             FROM generate_series(1, 5000) AS n;
             ALTER TABLE tidings.schedules SET (fillfactor = 77);
             GRANT SELECT ON tidings.schedules TO {shop} WITH GRANT OPTION"
        )))
        .await
        .expect("rows");
    let (rows, form): (String, String) = (world.value(DIGEST).await, world.value(FORM).await);
    assert!(form.contains("fillfactor=77") && form.contains("r*"), "{form}");

    for partitions in [4, 16, 3] {
        let output = partition_well(&world, partitions).await;
        assert!(output.contains(&format!("is a table of {partitions} partitions; it was locked for")), "{output}");
        assert_eq!(world.value::<i64>(COUNT).await, i64::from(partitions));
        assert_eq!(world.value::<String>(DIGEST).await, rows);
        let now = world.value::<String>(FORM).await;
        assert_eq!(now.replace("schedules_id\n", ""), form, "{partitions}");
        let (_, report) = world.launch().subcommand("doctor").run_to_end().await;
        assert!(report.contains("indexes of the schema tidings are there and valid"), "{report}");
        assert!(report.contains("triggers of tidings.schedules are there and enabled"), "{report}");
    }
    assert!(partition_well(&world, 3).await.contains("was a table of 3 partitions already"));
    let (code, output) = world.launch().subcommand("migrate").run_to_end().await;
    assert!(code == 0 && output.contains("up to date"), "{output}");
    partition_well(&world, 1).await;
    assert_eq!(world.value::<String>(DIGEST).await, rows);
    assert_eq!(world.value::<String>(FORM).await, form);
    let primary_key = "SELECT count(*) FROM pg_index WHERE indrelid = 'tidings.schedules'::regclass AND indisprimary";
    assert_eq!(world.value::<i64>(primary_key).await, 1);
}

#[tokio::test]
async fn nothing_is_lost_while_rows_move_into_partitions_under_daemons_and_producers() {
    let world = World::with_plugins(&["message"]).await;
    partition_well(&world, 1).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemons = [world.start_daemon().await, world.start_daemon().await];
    let pool = world.db.clone();
    let producer = tokio::spawn(async move {
        let mut ids: Vec<Uuid> = Vec::new();
        for number in 0..1_500 {
            let sql = format!(
                "SELECT tidings.schedule('message', now() + random() * interval '2 seconds', {MESSAGE}, key => nullif('k{number}', 'k{}'))",
                number / 2 * 2
            );
            ids.push(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&pool).await.expect("scheduled"));
        }
        ids
    });
    for partitions in [4, 2, 1, 8] {
        partition_well(&world, partitions).await;
    }
    let mut waiting: std::collections::BTreeSet<Uuid> = producer.await.expect("no panic").into_iter().collect();
    while !waiting.is_empty() {
        let received = inbox.next().await;
        assert!(waiting.remove(&received.id()), "{} came twice", received.id());
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    for daemon in daemons {
        assert!(daemon.stop().await.success());
    }
}

#[tokio::test]
async fn what_an_administrator_added_to_the_table_is_named_and_nothing_is_changed() {
    let world = World::with_plugins(&["message"]).await;
    partition_well(&world, 1).await;
    let form: String = world.value(FORM).await;
    for (make, drop, name) in [
        ("CREATE INDEX mine ON tidings.schedules (created_at)", "DROP INDEX tidings.mine", "index tidings.mine"),
        (
            "CREATE TRIGGER mine BEFORE DELETE ON tidings.schedules EXECUTE FUNCTION tidings.look_afresh()",
            "DROP TRIGGER mine ON tidings.schedules",
            "trigger mine",
        ),
        ("CREATE VIEW mine AS SELECT id FROM tidings.schedules", "DROP VIEW mine", "view mine"),
        ("CREATE PUBLICATION mine FOR TABLE tidings.schedules", "DROP PUBLICATION mine", "publication mine"),
        (
            "CREATE TABLE mine (id uuid REFERENCES tidings.schedules)",
            "DROP TABLE mine",
            "foreign key mine_id_fkey of mine",
        ),
        (
            "CREATE POLICY mine ON tidings.schedules USING (true)",
            "DROP POLICY mine ON tidings.schedules",
            "policy mine",
        ),
    ] {
        world.sql(make).await;
        let (code, output) = partition(&world, 4).await;
        assert_eq!(code, 1, "{output}");
        let name = name.replace("view mine", "view public.mine").replace("of mine", "of public.mine");
        assert!(output.contains(&name) && output.contains("nothing was changed"), "{output}");
        world.sql(drop).await;
        assert_eq!(world.value::<String>(FORM).await, form);
    }
    for wrong in ["0", "129", "many"] {
        let migrate = world.launch().subcommand("migrate").args(["--partitions", wrong]);
        let (code, output) = migrate.run_to_end().await;
        assert!(code == 64 && output.contains("--partitions"), "{code} {output}");
    }
}

#[tokio::test]
async fn producers_write_into_partitions_as_they_write_into_the_table() {
    let world = World::with_plugins(&["message"]).await;
    world.sql("ALTER TABLE tidings.schedules ENABLE ROW LEVEL SECURITY").await;
    world.sql("CREATE PUBLICATION everything FOR ALL TABLES").await;
    partition_well(&world, 8).await;
    let role = create_role(&world, "shop", "").await;
    world.sql(&format!("GRANT tidings_producer TO {role}")).await;
    let shop = sqlx::PgPool::connect(&database_url_of(&world, &role)).await.expect("connected");
    for statement in [
        "INSERT INTO tidings.schedules (kind, key, due_at) VALUES ('message', 'a', '2100-01-01') ON CONFLICT (kind, key) WHERE key IS NOT NULL DO NOTHING",
        "INSERT INTO tidings.schedules (kind, key, due_at) VALUES ('message', 'a', '2101-01-01') ON CONFLICT (kind, key) WHERE key IS NOT NULL DO UPDATE SET due_at = excluded.due_at",
        "INSERT INTO tidings.schedules (kind, key, due_at) VALUES ('message', 'a', '2102-01-01') ON CONFLICT DO NOTHING",
        "UPDATE tidings.schedules SET key = 'b', kind = 'other' WHERE key = 'a'",
        "UPDATE tidings.schedules SET key = NULL WHERE key = 'b'",
    ] {
        let done = shop.execute(statement).await.expect(statement);
        assert_eq!(done.rows_affected(), u64::from(!statement.ends_with("CONFLICT DO NOTHING")), "{statement}");
    }
    assert_eq!(world.value::<i32>("SELECT extract(year FROM due_at)::int FROM tidings.schedules").await, 2101);
    world.sql("INSERT INTO tidings.schedules (kind, key, due_at) VALUES ('message', 'a', '2100-01-01')").await;
    let again = "INSERT INTO tidings.schedules (kind, key, due_at) VALUES ('message', 'a', '2100-01-01')";
    let error = shop.execute(again).await.expect_err("the key is taken").to_string();
    assert!(error.contains("kind_key"), "{error}");
    let hidden = shop.execute("SELECT FROM tidings.schedules_0").await.expect_err("no rights").to_string();
    assert!(hidden.contains("permission denied"), "{hidden}");
    assert_eq!(shop.execute("DELETE FROM tidings.schedules").await.expect("deleted").rows_affected(), 2);
}
