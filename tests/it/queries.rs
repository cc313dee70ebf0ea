//! The checked queries in `.sqlx`, which the daemon is compiled with, against the schema that the migrations make: they
//! must not drift apart. To write them anew see migrations/README.md.

use harness::world::World;
use sqlx::{AssertSqlSafe, Executor as _, SqlSafeStr as _};

#[tokio::test]
async fn the_checked_queries_are_those_of_the_schema() {
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
    // Of those that we serve one is paused.
    world.sql("INSERT INTO tidings.schedules (kind, due_at, held) SELECT 'other', now(), true FROM generate_series(1, 1000)").await;
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('other')").await;
    world.sql("ANALYZE tidings.schedules").await;
    let dir = std::fs::read_dir(harness::repository().join(".sqlx")).expect("the checked queries");
    let queries = dir.map(|entry| std::fs::read_to_string(entry.expect("an entry").path()).expect("a file"));
    let queries: Vec<serde_json::Value> = queries.map(|text| serde_json::from_str(&text).expect("JSON")).collect();
    let mut texts = queries.iter().map(|file| file["query"].as_str().expect("a query"));
    let look = texts.find(|text| text.contains("held_for_us")).expect("the look is among them");
    let mut connection = world.db.acquire().await.expect("a connection");
    let mut run =
        async |sql: String| sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *connection).await.expect("it runs");

    run(format!("PREPARE look(text[], timestamptz) AS {look}")).await;
    // From the sixth on, PostgreSQL may plan for any argument.
    for _ in 0..6 {
        run("EXECUTE look('{message,other}', NULL)".into()).await;
    }
    let plan = run("EXPLAIN (ANALYZE, BUFFERS, COSTS OFF) EXECUTE look('{message,other}', NULL)".into()).await;

    let plan: Vec<String> = plan.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    // The first is that of the whole statement.
    let buffers = plan.iter().find(|line| line.contains("Buffers: shared")).expect("they are counted");
    let pages = buffers.split(['=', ' ']).filter_map(|word| word.parse::<u64>().ok());
    assert!(pages.sum::<u64>() < 40, "{}", plan.join("\n"));
}
