//! The SQL interface: functions, plain statements, constraints, roles. Most of these tests run no daemon.

use harness::world::{World, database_url};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use uuid::Uuid;

#[tokio::test]
async fn schedule_with_a_pending_key_replaces_keeps_or_raises_an_error() {
    let world = World::empty().await;
    let schedule = async |payload: &str, on_conflict: &str| {
        let sql = format!(
            "SELECT tidings.schedule('a', now() + interval '1 hour', '{payload}', key => 'k', on_conflict => '{on_conflict}')"
        );
        world.value::<Uuid>(&sql).await
    };
    let pending = "SELECT id::text || payload::text FROM tidings.schedules";

    let first = schedule("1", "replace").await;
    let second = schedule("2", "replace").await;
    assert_ne!(first, second, "a replaced row has a new id");
    assert_eq!(world.value::<String>(pending).await, format!("{second}2"));

    assert_eq!(schedule("3", "keep").await, second);
    assert_eq!(world.value::<String>(pending).await, format!("{second}2"));

    let error = world.expect_error("SELECT tidings.schedule('a', now(), key => 'k', on_conflict => 'error')").await;
    assert!(error.contains(r#"key "k" of kind "a" is already scheduled"#), "{error}");

    // The same key in another kind does not conflict, and rows without a key never do.
    world.sql("SELECT tidings.schedule('b', now(), key => 'k', on_conflict => 'error')").await;
    world.sql("SELECT tidings.schedule('a', now(), on_conflict => 'error') FROM generate_series(1, 2)").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 4);
}

#[tokio::test]
async fn replacing_a_row_resets_its_attempts_and_other_columns() {
    let world = World::empty().await;
    world.sql("SELECT tidings.schedule('a', now(), key => 'k', subject => 's', headers => '{\"h\":\"1\"}')").await;
    world.sql("UPDATE tidings.schedules SET attempts = 3, failures = 3, held = true, last_error = 'x', not_before = now() + interval '1 h'").await;

    world.sql("SELECT tidings.schedule('a', now(), key => 'k')").await;

    let fresh =
        "SELECT attempts = 0 AND failures = 0 AND NOT held AND last_error IS NULL AND slot_at <= clock_timestamp()
                 AND subject IS NULL AND headers = '{}' FROM tidings.schedules";
    assert!(world.value::<bool>(fresh).await);
}

#[tokio::test]
async fn reschedule_moves_a_row_with_a_new_id_and_keeps_its_payload_and_subject() {
    let world = World::empty().await;
    let id: Uuid = world.value("SELECT tidings.schedule('a', now(), '{\"p\":1}', key => 'k', subject => 's')").await;
    world.sql("UPDATE tidings.schedules SET attempts = 3, last_error = 'x'").await;

    assert!(world.value::<bool>("SELECT tidings.reschedule('a', 'k', '2100-01-01Z')").await);

    let moved = "SELECT attempts = 0 AND last_error IS NULL AND payload = '{\"p\":1}' AND subject = 's' AND due_at = '2100-01-01Z'
                 AND slot_at = due_at FROM tidings.schedules";
    assert!(world.value::<bool>(moved).await);
    assert_ne!(world.value::<Uuid>("SELECT id FROM tidings.schedules").await, id);
    assert!(!world.value::<bool>("SELECT tidings.reschedule('a', 'another', now())").await);
    let error = world.expect_error("SELECT tidings.reschedule('a', 'k', 'infinity')").await;
    assert!(error.contains("due_at"), "{error}");
}

#[tokio::test]
async fn cancel_removes_one_row_and_cancel_subject_removes_all_rows_of_a_subject() {
    let world = World::empty().await;
    world.sql("SELECT tidings.schedule('a', now(), key => n::text, subject => 's' || n % 2) FROM generate_series(1, 5) AS n").await;

    assert!(world.value::<bool>("SELECT tidings.cancel('a', '2')").await);
    assert!(!world.value::<bool>("SELECT tidings.cancel('a', '2')").await);
    assert_eq!(world.value::<i64>("SELECT tidings.cancel_subject('s1')").await, 3);
    assert_eq!(world.value::<i64>("SELECT tidings.cancel_subject('s1')").await, 0);
    assert_eq!(world.value::<String>("SELECT key FROM tidings.schedules").await, "4");
}

#[tokio::test]
async fn a_rollback_undoes_schedule_reschedule_and_cancel() {
    let world = World::empty().await;
    world.sql("SELECT tidings.schedule('a', '2100-01-01Z', key => 'k')").await;
    let before: String = world.value("SELECT s::text FROM tidings.schedules AS s").await;

    let mut transaction = world.db.begin().await.expect("a transaction");
    for sql in [
        "SELECT tidings.schedule('a', now())",
        "SELECT tidings.reschedule('a', 'k', now())",
        "SELECT tidings.cancel('a', 'k')",
    ] {
        transaction.execute(sql).await.expect(sql);
    }
    transaction.rollback().await.expect("rolled back");

    assert_eq!(world.value::<String>("SELECT s::text FROM tidings.schedules AS s").await, before);
}

#[tokio::test]
async fn invalid_input_raises_an_error_that_names_the_column_in_insert_and_in_schedule() {
    let world = World::empty().await;
    let long = "x".repeat(256);
    let headers_too_long = format!(r#"{{"h":"{}"}}"#, "v".repeat(16_384));
    let name_too_long = format!(r#"{{"{long}":"v"}}"#);
    for (columns, values, named) in [
        ("kind, due_at", "null, now()", "kind"),
        ("kind, due_at", "'', now()", "kind must match"),
        ("kind, due_at", "'Not A Kind', now()", "kind must match"),
        ("kind, due_at", &format!("'{long}', now()"), "kind must match"),
        ("kind, due_at", "'a', null", "due_at"),
        ("kind, due_at", "'a', 'infinity'", "due_at must be between"),
        ("kind, due_at", "'a', '-infinity'", "due_at must be between"),
        ("kind, due_at", "'a', '1969-12-31Z'", "due_at must be between"),
        ("kind, due_at", "'a', '10000-01-01Z'", "due_at must be between"),
        ("kind, due_at, expires_at", "'a', now(), now()", "expires_at must be after due_at"),
        ("kind, due_at, expires_at", "'a', now(), 'infinity'", "expires_at must be between"),
        ("kind, due_at, key", "'a', now(), ''", "key must be 1 to 255 bytes"),
        ("kind, due_at, key", &format!("'a', now(), '{long}'"), "key must be 1 to 255 bytes"),
        ("kind, due_at, subject", "'a', now(), ''", "subject must be 1 to 255 bytes"),
        ("kind, due_at, payload", "'a', now(), null", "payload"),
        ("kind, due_at, headers", "'a', now(), null", "headers"),
        ("kind, due_at, headers", "'a', now(), '[]'", "headers must be an object of strings"),
        ("kind, due_at, headers", "'a', now(), '\"h\"'", "headers must be an object of strings"),
        ("kind, due_at, headers", r#"'a', now(), '{"h":1}'"#, "headers must be an object of strings"),
        ("kind, due_at, headers", r#"'a', now(), '{"h":["v"]}'"#, "headers must be an object of strings"),
        ("kind, due_at, headers", &format!("'a', now(), '{headers_too_long}'"), "headers must be an object of strings"),
        ("kind, due_at, headers", r#"'a', now(), '{"x-death":"v"}'"#, "headers must not be named"),
        ("kind, due_at, headers", r#"'a', now(), '{"tidings-kind":"v"}'"#, "headers must not be named"),
        ("kind, due_at, headers", r#"'a', now(), '{"CC":"v"}'"#, "headers must not be named"),
        ("kind, due_at, headers", r#"'a', now(), '{"BCC":"v"}'"#, "headers must not be named"),
        ("kind, due_at, headers", r#"'a', now(), '{"":"v"}'"#, "headers must not be named"),
        ("kind, due_at, headers", &format!("'a', now(), '{name_too_long}'"), "headers must not be named"),
    ] {
        let error = world.expect_error(&format!("INSERT INTO tidings.schedules ({columns}) VALUES ({values})")).await;
        assert!(error.contains(named), "INSERT {columns}: {values}: {error}");

        let arguments: Vec<String> = columns
            .split(", ")
            .zip(values.splitn(columns.split(", ").count(), ", "))
            .map(|(name, value)| format!("{name} => {value}"))
            .collect();
        let error = world.expect_error(&format!("SELECT tidings.schedule({})", arguments.join(", "))).await;
        assert!(error.contains(named), "schedule {columns}: {values}: {error}");
    }
    let error = world.expect_error("SELECT tidings.schedule('a', now(), on_conflict => 'ignore')").await;
    assert!(error.contains("on_conflict must be replace, keep or error, not 'ignore'"), "{error}");
    let error = world.expect_error("SELECT tidings.schedule('a', now(), on_conflict => null)").await;
    assert!(error.contains("on_conflict"), "{error}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 0);
}

#[tokio::test]
async fn the_smallest_and_largest_allowed_values_are_accepted() {
    let world = World::empty().await;
    let long = "x".repeat(255);
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, due_at, expires_at, key, subject, payload, headers) VALUES
               ('{}', '1970-01-01Z', '9999-12-31T23:59:59.999999Z', '{long}', '{long}', 'null', '{{"{long}":"v","X-Request":"","cc":"é"}}'),
               ('0', '9999-12-31T23:59:59.999998Z', '9999-12-31T23:59:59.999999Z', null, null, '[1]', '{{}}')"#,
            "k".repeat(100)
        ))
        .await;
}

#[tokio::test]
async fn ids_are_uuids_of_version_7_in_the_order_of_time() {
    let world = World::empty().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(world.value::<Uuid>("SELECT tidings.schedule('a', now())").await);
        world.sql("SELECT pg_sleep(0.002)").await;
    }
    assert!(ids.is_sorted(), "{ids:?}");
    let now_ms = world.now().await.unix_timestamp_nanos() / 1_000_000;
    for id in ids {
        assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
        let ms = i128::try_from(id.as_u128() >> 80).expect("48 bits");
        assert!((now_ms - 60_000..=now_ms).contains(&ms), "{id}");
    }
}

#[tokio::test]
async fn updating_due_at_gives_a_row_a_new_id_and_other_updates_keep_the_id() {
    let world = World::empty().await;
    let id: Uuid = world.value("SELECT tidings.schedule('a', '2100-01-01Z', key => 'k')").await;
    let current = "SELECT id FROM tidings.schedules";

    world.sql("UPDATE tidings.schedules SET payload = '2', key = 'l', due_at = due_at").await;
    assert_eq!(world.value::<Uuid>(current).await, id);

    world.sql("UPDATE tidings.schedules SET due_at = '2100-01-02Z'").await;
    assert_ne!(world.value::<Uuid>(current).await, id);
}

#[tokio::test]
async fn editing_a_row_that_backs_off_or_is_held_makes_it_due_at_once() {
    let world = World::empty().await;
    world.sql("SELECT tidings.schedule('a', now(), key => 'k')").await;
    world.sql("UPDATE tidings.schedules SET not_before = now() + interval '5 min', attempts = 4, refusals = 2, held = true").await;

    world.sql("UPDATE tidings.schedules SET payload = '{\"mended\":true}'").await;

    let afresh =
        "SELECT NOT held AND refusals = 0 AND attempts = 4 AND slot_at <= clock_timestamp() FROM tidings.schedules";
    assert!(world.value::<bool>(afresh).await);
}

#[tokio::test]
async fn a_producer_can_schedule_in_every_way_and_has_no_other_rights() {
    let world = World::empty().await;
    let role = format!("app_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN")).await;
    world.sql(&format!("GRANT tidings_producer TO {role}")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut app = PgConnection::connect(&url).await.expect("the application logs in");

    for sql in [
        "INSERT INTO tidings.schedules (kind, key, subject, due_at, expires_at, payload, headers)
         VALUES ('a', 'k', 's', now(), now() + interval '1 h', '{}', '{\"traceparent\":\"x\"}') RETURNING id",
        "UPDATE tidings.schedules SET kind = 'b', key = 'l', subject = 't', due_at = now() + interval '1 s', expires_at = null, payload = '1', headers = '{}'",
        "SELECT * FROM tidings.schedules, tidings.deliveries, tidings.parked",
        "DELETE FROM tidings.schedules WHERE key = 'l'",
        "SELECT tidings.schedule('a', now(), key => 'k')",
        "SELECT tidings.reschedule('a', 'k', now())",
        "SELECT tidings.cancel('a', 'k')",
        "SELECT tidings.cancel_subject('s')",
        "CREATE TEMP TABLE games (id int); INSERT INTO games VALUES (1); SELECT tidings.schedule('a', now()) FROM games",
    ] {
        app.execute(AssertSqlSafe(sql.to_owned())).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    let mut copy =
        app.copy_in_raw("COPY tidings.schedules (kind, key, due_at, payload) FROM STDIN").await.expect("copies");
    for number in 0..1_000 {
        copy.send(format!("a\t{number}\t2100-01-01Z\t{{\"n\":{number}}}\n").into_bytes()).await.expect("a line");
    }
    assert_eq!(copy.finish().await.expect("copied"), 1_000);

    for sql in [
        "INSERT INTO tidings.schedules (id, kind, due_at) VALUES (gen_random_uuid(), 'a', now())",
        "INSERT INTO tidings.schedules (kind, due_at, not_before) VALUES ('a', now(), now())",
        "UPDATE tidings.schedules SET attempts = 1",
        "UPDATE tidings.schedules SET held = true",
        "TRUNCATE tidings.schedules",
        "DELETE FROM tidings.deliveries",
        "DELETE FROM tidings.parked",
        "SELECT tidings.unpark(gen_random_uuid())",
        "CREATE TABLE tidings.mine ()",
    ] {
        let error = app.execute(AssertSqlSafe(sql.to_owned())).await.expect_err(sql).to_string();
        assert!(error.contains("permission denied"), "{sql}: {error}");
    }
}

#[tokio::test]
async fn the_daemon_runs_as_a_member_of_tidings_daemon() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let role = format!("daemon_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN")).await;
    world.sql(&format!("GRANT tidings_daemon TO {role}")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;

    world.sql("SELECT tidings.schedule(kind, now()) FROM unnest('{invalid,skip,trap,nobody}'::text[]) AS kind").await;
    world.sql("SELECT tidings.schedule('echo', now())").await;

    inbox.next().await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.deliveries").await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules WHERE held OR attempts > 0").await;
}

#[tokio::test]
async fn a_user_without_either_role_can_neither_schedule_nor_read() {
    let world = World::empty().await;
    let role = format!("nobody_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut nobody = PgConnection::connect(&url).await.expect("logs in");

    for sql in ["SELECT tidings.schedule('a', now())", "SELECT 1 FROM tidings.schedules"] {
        let error = nobody.execute(sql).await.expect_err(sql).to_string();
        assert!(error.contains("permission denied"), "{error}");
    }
}

#[tokio::test]
async fn a_transaction_can_be_prepared_after_it_turns_notifications_off() {
    let world = World::with_plugins(&["message"]).await;
    let mut session = world.db.acquire().await.expect("a session");
    let schedule = r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#;
    let name = &world.name;

    session.execute("BEGIN").await.expect("begun");
    session.execute(schedule).await.expect("scheduled");
    let refused = session.execute(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"))).await;
    assert!(refused.expect_err("PostgreSQL refuses it").to_string().contains("NOTIFY"));

    session.execute("BEGIN; SET LOCAL tidings.notify = off").await.expect("begun");
    session.execute(schedule).await.expect("scheduled");
    session.execute(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'"))).await.expect("prepared");
    session.execute(AssertSqlSafe(format!("COMMIT PREPARED '{name}'"))).await.expect("committed");

    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    inbox.next().await;
}

#[tokio::test]
async fn schedule_waits_for_a_row_in_flight_with_the_same_key_and_then_inserts() {
    let world = World::empty().await;
    let first: Uuid = world.value("SELECT tidings.schedule('a', now(), key => 'k')").await;
    // The claim locks the row and then deletes it, as the daemon does.
    let mut claim = world.db.begin().await.expect("a transaction");
    claim.execute("SELECT FROM tidings.schedules FOR UPDATE").await.expect("locked");

    for on_conflict in ["keep", "error", "replace"] {
        let db = world.db.clone();
        let sql = format!("SELECT tidings.schedule('a', now(), key => 'k', on_conflict => '{on_conflict}')");
        let scheduling = tokio::spawn(async move {
            sqlx::query(AssertSqlSafe(sql)).fetch_one(&db).await.map(|row| row.get::<Uuid, _>(0))
        });
        world.wait_until("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')").await;
        claim.execute("DELETE FROM tidings.schedules").await.expect("deleted");
        claim.commit().await.expect("delivered");
        let second = scheduling.await.expect("no panic").unwrap_or_else(|error| panic!("{on_conflict}: {error}"));
        assert_ne!(first, second, "{on_conflict}");

        claim = world.db.begin().await.expect("a transaction");
        claim.execute("SELECT FROM tidings.schedules FOR UPDATE").await.expect("locked");
    }
}
