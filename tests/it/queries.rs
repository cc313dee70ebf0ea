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
