//! Compares the checked queries in `.sqlx`, with which the daemon is compiled, with the schema that the migrations
//! make, and checks what the queries cost. How to write `.sqlx` anew: migrations/README.md.

use harness::world::World;
use sqlx::{AssertSqlSafe, Executor as _, SqlSafeStr as _};

#[tokio::test]
async fn the_checked_queries_match_the_schema() {
    let world = World::empty().await;
    let mut checked = 0;
    for entry in std::fs::read_dir(harness::repository().join(".sqlx")).expect("the checked queries") {
        let file = std::fs::read_to_string(entry.expect("an entry").path()).expect("a file");
        let file: serde_json::Value = serde_json::from_str(&file).expect("JSON");
        let query = file["query"].as_str().expect("a query").to_owned();

        let described = world.db.describe(AssertSqlSafe(query.clone()).into_sql_str()).await;

        let described = described.unwrap_or_else(|error| panic!("{query}\n{error}"));
        let described = serde_json::to_value(&described).expect("JSON");
        assert_eq!(described["columns"], file["describe"]["columns"], "{query}");
        assert_eq!(described["parameters"], file["describe"]["parameters"], "{query}");
        checked += 1;
    }
    assert!(checked > 0, "there are none");
}

/// The checked query, or the one in a file of its own, that contains `part`.
pub(crate) fn find_checked_query(part: &str) -> String {
    let dir = std::fs::read_dir(harness::repository().join(".sqlx")).expect("the checked queries");
    let files = dir.map(|entry| std::fs::read_to_string(entry.expect("an entry").path()).expect("a file"));
    let checked = files.map(|text| {
        serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["query"].as_str().expect("a query").to_owned()
    });
    let claim = concat!(
        include_str!("../../../host/src/store/queue/claim/rows.sql"),
        include_str!("../../../host/src/store/queue/claim/due.sql"),
        include_str!("../../../host/src/store/queue/claim/summary.sql"),
        include_str!("../../../host/src/store/queue/claim/due_outlook.sql"),
        ", NULL",
    );
    let mut texts = checked.chain([claim.to_owned()]);
    texts.find(|text| text.contains(part)).unwrap_or_else(|| panic!("no query with {part}"))
}

/// A part that only the claim query contains.
pub(crate) const CLAIM: &str = "generate_series(1, units)";

/// The number of pages that a prepared query with a generic plan reads, and its plan.
pub(crate) async fn count_pages(world: &World, query: &str, types: &str, arguments: &str) -> (u64, String) {
    count_pages_after(world, "SELECT", query, types, arguments).await
}

/// The same after another statement of the session.
async fn count_pages_after(world: &World, before: &str, query: &str, types: &str, arguments: &str) -> (u64, String) {
    let mut connection = world.db.acquire().await.expect("a connection");
    let mut run =
        async |sql: String| sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *connection).await.expect("it runs");
    // The same planner settings as in the daemon's sessions.
    run("SET plan_cache_mode = force_generic_plan".into()).await;
    run("SET enable_sort = off".into()).await;
    run(before.into()).await;
    run(format!("PREPARE asked({types}) AS {query}")).await;
    let plan = run(format!("EXPLAIN (ANALYZE, BUFFERS, COSTS OFF) EXECUTE asked({arguments})")).await;
    run("DEALLOCATE asked".into()).await;
    run("RESET ALL".into()).await;
    let plan: Vec<String> = plan.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    // The first such line is that of the whole statement.
    let buffers = plan.iter().find(|line| line.contains("Buffers: shared")).expect("they are counted");
    let pages = buffers.split(['=', ' ']).filter_map(|word| word.parse::<u64>().ok()).sum();
    (pages, plan.join("\n"))
}

#[tokio::test]
async fn a_look_at_the_queue_costs_the_same_however_many_rows_are_held() {
    let world = World::empty().await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, held)
             SELECT 'nobody-' || number % 7, now() - interval '1 day', true FROM generate_series(1, 100000) AS number",
        )
        .await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() + interval '1 day' FROM generate_series(1, 10)").await;
    // One of the served kinds is paused.
    world.sql("INSERT INTO tidings.schedules (kind, due_at, held) SELECT 'other', now(), true FROM generate_series(1, 1000)").await;
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('other')").await;
    world.sql("ANALYZE tidings.schedules").await;

    // The same statement looks and sweeps.
    for sweep in ["false", "true"] {
        let arguments = format!("'{{message,other}}', NULL, {sweep}, 1000");
        let types = "text[], timestamptz, boolean, bigint";
        let (pages, plan) = count_pages(&world, &find_checked_query("held_for_us"), types, &arguments).await;
        assert!(pages < 40, "{plan}");
    }
}

#[tokio::test]
async fn a_look_costs_the_same_when_rows_have_just_been_moved_into_a_line_and_the_statistics_do_not_know_it() {
    let world = World::empty().await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at)
             SELECT 'message', now() - interval '1 s' + number * interval '1 us' FROM generate_series(1, 100000) AS number",
        )
        .await;
    world.sql("VACUUM ANALYZE tidings.schedules").await;
    world.sql("UPDATE tidings.schedules SET held = true, line = '', not_before = now()").await;
    world.sql("VACUUM tidings.schedules").await;

    let types = "text[], timestamptz, boolean, bigint";
    let look = find_checked_query("held_for_us");
    let (pages, plan) = count_pages(&world, &look, types, "'{message,other}', NULL, false, 1000").await;

    assert!(pages < 40, "{pages}\n{plan}");
}

#[tokio::test]
async fn a_claim_and_its_settlement_cost_the_same_however_many_rows_wait() {
    let world = World::empty().await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, key, due_at)
             SELECT 'message', number::text, now() + (number - 10) * interval '1 minute' FROM generate_series(1, 100000) AS number",
        )
        .await;
    world.sql("ANALYZE tidings.schedules").await;

    let types = "text[], bigint, bigint, timestamptz, boolean";
    let (read, plan) =
        count_pages(&world, &find_checked_query(CLAIM), types, "'{message}', 200, 2097152, '-infinity', false").await;
    assert!(read < 60 && !plan.contains("Seq Scan on schedules"), "{read}\n{plan}");

    let types = "uuid[], text[], timestamptz[], text[], text[], text[], bigint[], text[]";
    let ids: Vec<uuid::Uuid> = world.value("SELECT array_agg(id) FROM tidings.schedules WHERE due_at <= now()").await;
    let count = ids.len();
    let ids = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let filled = |value: &str| format!("array_fill({value}, ARRAY[{count}])");
    let text = filled("'x'::text");
    let (instant, number) = (filled("now()"), filled("1::bigint"));
    let arguments = format!(
        "'{{{ids}}}', {}, {instant}, {text}, {text}, {text}, {number}, '{{delivered}}'",
        filled("'delivered'::text")
    );
    let (read, plan) =
        count_pages(&world, &find_checked_query("INSERT INTO tidings.deliveries"), types, &arguments).await;
    assert!(read < 200 && !plan.contains("Seq Scan on schedules"), "{read}\n{plan}");
}

#[tokio::test]
async fn turns_cost_the_same_however_many_rows_wait_for_them() {
    let world = World::empty().await;
    world.sql("SELECT tidings.limit('message', 100, burst => 20, by => 'subject'), tidings.limit('other', 1)").await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, subject, due_at, held, line)
             SELECT CASE WHEN number % 2 = 0 THEN 'message' ELSE 'other' END, number % 1000, now() - number * interval '1 ms', true,
                 CASE WHEN number % 2 = 0 THEN (number % 1000)::text ELSE '' END
             FROM generate_series(1, 100000) AS number",
        )
        .await;
    world.sql("INSERT INTO tidings.lines (kind, subject) SELECT DISTINCT kind, line FROM tidings.schedules").await;
    world.sql("ANALYZE").await;

    let types = "text[], timestamptz, boolean, bigint";
    let look = find_checked_query("held_for_us");
    let (pages, plan) = count_pages(&world, &look, types, "'{message,other}', NULL, false, 1000").await;
    assert!(pages < 40 && !plan.contains("Seq Scan on schedules"), "{pages}\n{plan}");

    let lock = include_str!("../../../host/src/store/queue/claim/lock_lines.sql");
    let (pages, plan) = count_pages(&world, lock, "text[], bigint", "'{message,other}', 50").await;
    assert!(pages < 60, "{pages}\n{plan}");

    let claim = concat!(
        include_str!("../../../host/src/store/queue/claim/turns.sql"),
        include_str!("../../../host/src/store/queue/claim/rows.sql"),
        include_str!("../../../host/src/store/queue/claim/turn_rows.sql"),
        include_str!("../../../host/src/store/queue/claim/summary.sql"),
        include_str!("../../../host/src/store/queue/claim/turns_outlook.sql"),
        ", NULL",
    );
    let types = "text[], bigint, bigint, timestamptz, boolean";
    let locked = r#"SET tidings.locked_lines = '[["message", "2"], ["message", "4"], ["other", ""]]'"#;
    let arguments = "'{message,other}', 500, 2097152, NULL, false";
    let (pages, plan) = count_pages_after(&world, locked, claim, types, arguments).await;
    // Each row is on a page of its own.
    assert!(pages < 250 && !plan.contains("Seq Scan on schedules"), "{pages}\n{plan}");

    let turn = include_str!("../../../host/src/store/queue/turn.sql");
    let types = "text[], text[], bigint[], bigint[], timestamptz[]";
    let arguments = "'{message,other}', '{2,\"\"}', '{1,1}', '{20,1}', '{now,now}'";
    let (pages, plan) = count_pages(&world, turn, types, arguments).await;
    assert!(pages < 80 && !plan.contains("Seq Scan on schedules"), "{pages}\n{plan}");
}

#[tokio::test]
async fn a_redelivered_message_finds_its_row_by_an_index_however_many_rows_there_are() {
    let world = World::empty().await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() + number * interval '1 minute' FROM generate_series(1, 50000) AS number").await;
    world
        .sql(
            "INSERT INTO tidings.parked (id, kind, due_at, payload, headers, attempts, created_at, reason)
             SELECT tidings.uuid_v7(), 'message', now(), '{}', '{}', 0, now(), 'x' FROM generate_series(1, 50000)",
        )
        .await;
    world
        .sql(
            "INSERT INTO tidings.deliveries (id, kind, due_at, finished_at, outcome, attempts, payload, headers)
             SELECT tidings.uuid_v7(), 'message', now(), now(), 'delivered', 0, '{}', '{}' FROM generate_series(1, 50000)",
        )
        .await;
    world.sql("ANALYZE").await;
    let types = "uuid[], bool[], text[], text[], text[], float8[], float8[], float8[], float8[], float8[], text[], text[], float8, bool, smallint[]";
    let id: uuid::Uuid = world.value("SELECT id FROM tidings.deliveries LIMIT 1").await;
    let nulls = "'{NULL}', '{NULL}', '{5}', '{NULL}', '{NULL}', '{NULL}'";
    let arguments = format!(
        r#"'{{{id}}}', '{{true}}', '{{relay}}', '{{key}}', {nulls}, '{{"{{}}"}}', '{{"{{}}"}}', 0, false, '{{4}}'"#
    );
    let (pages, plan) = count_pages(&world, &find_checked_query("FROM kept UNION ALL"), types, &arguments).await;
    assert!(pages < 40 && !plan.contains("Seq Scan"), "{pages}\n{plan}");
    assert!(world.value::<bool>("SELECT NOT EXISTS (SELECT FROM tidings.schedules WHERE kind = 'relay')").await);
}

#[tokio::test]
async fn the_queries_of_the_page_cost_the_same_however_many_rows_wait_or_are_parked() {
    let world = World::empty().await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() + number * interval '1 minute' FROM generate_series(1, 100000) AS number").await;
    world
        .sql(
            "INSERT INTO tidings.parked (id, kind, due_at, payload, headers, attempts, created_at, reason)
             SELECT tidings.uuid_v7(), 'message', now(), '{}', '{}', 0, now(), repeat('x', 500) FROM generate_series(1, 100000)",
        )
        .await;
    world.sql("ANALYZE").await;
    for (part, types, arguments, most) in [
        ("left(reason, 1000)", "bigint", "50", 120),
        ("SELECT id FROM tidings.parked ORDER BY id LIMIT", "bigint", "50", 120),
        ("slot_at AS \"at!\"", "timestamptz, float8, text, bigint, timestamptz", "now(), NULL, NULL, 10, NULL", 40),
    ] {
        let (pages, plan) = count_pages(&world, &find_checked_query(part), types, arguments).await;
        assert!(pages < most && !plan.contains("Seq Scan"), "{pages} {part}\n{plan}");
    }
}
