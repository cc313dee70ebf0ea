//! What the daemon tells Prometheus, and what it writes to its log: the numbers are right, the dashboard and the alerts find
//! what they ask for, and nobody can make a series, or find a secret, by what a row says.

use std::collections::{BTreeMap, BTreeSet};

use harness::daemon::Daemon;
use harness::guests::{trapping, well_behaved};
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url};
use harness::{eventually, repository};
use serde_json::Value;
use uuid::Uuid;

use crate::on_time::queries::{checked, pages};

/// What `/metrics` says: the value of each series, by its name and labels.
pub(crate) async fn scrape(daemon: &mut Daemon) -> BTreeMap<String, f64> {
    scrape_at(&daemon.http_addr().await).await
}

/// The same of a daemon that is known by its address.
pub(crate) async fn scrape_at(addr: &str) -> BTreeMap<String, f64> {
    let url = format!("http://{addr}/metrics");
    let asked = tokio::task::spawn_blocking(move || {
        ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text")
    });
    let text = asked.await.expect("asked");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let series = lines.map(|line| line.rsplit_once(' ').expect("a name and a value"));
    series.map(|(name, value)| (name.to_owned(), value.parse().expect("a number"))).collect()
}

/// Waits until the series `name` has a value that is `right`, and returns it.
async fn until(daemon: &mut Daemon, name: &str, right: impl Fn(f64) -> bool) -> f64 {
    eventually(name, async || scrape(daemon).await.get(name).copied().filter(|value| right(*value))).await
}

/// Waits until the series `name` has this value.
pub(crate) async fn until_is(daemon: &mut Daemon, name: &str, value: f64) {
    until(daemon, name, |now| now.total_cmp(&value).is_eq()).await;
}

/// The metrics in an expression.
fn metrics_in(expression: &str) -> impl Iterator<Item = String> {
    let words = expression.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
    words.filter(|word| word.starts_with("tidings_")).map(str::to_owned)
}

/// Every expression in the dashboard.
fn expressions(dashboard: &Value, found: &mut Vec<String>) {
    match dashboard {
        Value::Object(object) => {
            found.extend(object.get("expr").and_then(Value::as_str).map(str::to_owned));
            object.values().for_each(|value| expressions(value, found));
        }
        Value::Array(array) => array.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn all_that_the_dashboard_and_the_alerts_ask_for_is_there_from_the_start() {
    let deploy = repository().join("host/deploy");
    let read = |file: &str| std::fs::read_to_string(deploy.join(file)).expect("it is there");
    let alerts = read("alerts.yml");
    let mut asked: Vec<String> =
        alerts.lines().filter(|line| line.trim().starts_with("expr: ")).map(str::to_owned).collect();
    let alerts = asked.len();
    let dashboard: Value = serde_json::from_str(&read("grafana/dashboards/tidings.json")).expect("JSON");
    expressions(&dashboard, &mut asked);
    assert!(alerts > 10 && asked.len() > alerts + 30, "{asked:?}");
    let world = World::with(&["message"]).await;
    let mut daemon = world.daemon().await;

    let there = scrape(&mut daemon).await;

    let there: BTreeSet<&str> = there.keys().map(|name| name.split('{').next().expect("a name")).collect();
    for expression in &asked {
        for name in metrics_in(expression) {
            assert!(there.contains(&*name), "{name} of {expression} is not among {there:?}");
        }
    }
}

#[tokio::test]
async fn rows_are_counted_by_kind_and_outcome_and_calls_by_result() {
    let world = World::with(&["misbehave"]).await;
    let mut inbox = world.inbox(&["misbehave.echo"]).await;
    let mut daemon = world.daemon().await;
    until_is(&mut daemon, r#"tidings_deliveries_total{kind="echo",outcome="delivered"}"#, 0.0).await;
    until_is(&mut daemon, "tidings_next_due_seconds", f64::INFINITY).await;

    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT kind, now(), payload::jsonb FROM (VALUES
                 ('echo', '1'), ('echo', '2'), ('echo', '3'), ('skip', '1'), ('skip', '2'), ('invalid', '1'),
                 ('retry', '3600000'), ('config', '1')) AS rows (kind, payload)",
        )
        .await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, expires_at)
             SELECT kind, now() - interval '2 s', now() - interval '1 s' FROM unnest('{echo,nobody-a}'::text[]) AS kind",
        )
        .await;
    world.sql("SELECT tidings.schedule('nobody-b', now())").await;

    for _ in 0..3 {
        inbox.next().await;
    }
    for (kind, outcome, rows) in [
        ("echo", "delivered", 3.0),
        ("echo", "expired", 1.0),
        ("skip", "skipped", 2.0),
        ("invalid", "parked", 1.0),
        ("retry", "retried", 1.0),
        ("(unserved)", "expired", 1.0),
        ("(unserved)", "held", 1.0),
    ] {
        until_is(&mut daemon, &format!("tidings_deliveries_total{{kind=\"{kind}\",outcome=\"{outcome}\"}}"), rows)
            .await;
    }
    // Nobody consumes it, so it is refused again and again.
    until(&mut daemon, r#"tidings_deliveries_total{kind="config",outcome="refused"}"#, |rows| rows >= 1.0).await;
    for (kind, result, calls) in
        [("echo", "built", 3.0), ("skip", "skipped", 2.0), ("invalid", "invalid", 1.0), ("retry", "retry", 1.0)]
    {
        let name = format!("tidings_plugin_calls_total{{plugin=\"misbehave\",kind=\"{kind}\",result=\"{result}\"}}");
        until_is(&mut daemon, &name, calls).await;
    }
    until_is(&mut daemon, r#"tidings_expired_total{where="row"}"#, 2.0).await;
    until_is(&mut daemon, r#"tidings_lateness_seconds_count{kind="echo"}"#, 3.0).await;
    until(&mut daemon, r#"tidings_plugin_call_seconds_count{plugin="misbehave"}"#, |calls| calls >= 8.0).await;
    let claims = until(&mut daemon, "tidings_claims_total", |claims| claims >= 1.0).await;
    until(&mut daemon, "tidings_claimed_rows_total", |rows| rows >= claims.max(10.0)).await;
    until(&mut daemon, "tidings_confirm_seconds_count", |batches| batches >= 1.0).await;
    // What waits: one asked for an hour, one is refused, one is held. PostgreSQL's statistics take a moment.
    for (name, rows) in [("tidings_pending", 3.0), ("tidings_held", 1.0), ("tidings_parked", 1.0)] {
        until_is(&mut daemon, name, rows).await;
    }
    until(&mut daemon, "tidings_next_due_seconds", |seconds| seconds <= 3600.0).await;
    // What a row says makes no series.
    let series = scrape(&mut daemon).await;
    assert!(!series.keys().any(|name| name.contains("nobody")), "{series:?}");
}

#[tokio::test]
async fn a_late_row_is_in_its_class_and_what_is_late_now_has_an_age() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let row = r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
                 VALUES ('message', now() - interval '60 s', now() - interval '60 s', '{"routing_key": "a", "body": 1}')"#;
    world.sql(row).await;
    // Somebody works on it, so that nobody can deliver it.
    let mut busy = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules FOR UPDATE").execute(&mut *busy).await.expect("locked");
    let mut daemon = world.daemon().await;

    until(&mut daemon, "tidings_oldest_due_age_seconds", |age| (60.0..120.0).contains(&age)).await;
    busy.rollback().await.expect("rolled back");
    inbox.next().await;

    until_is(&mut daemon, r#"tidings_lateness_seconds_bucket{kind="message",le="120"}"#, 1.0).await;
    let series = scrape(&mut daemon).await;
    for class in ["0.001", "1", "30"] {
        let name = format!("tidings_lateness_seconds_bucket{{kind=\"message\",le=\"{class}\"}}");
        assert_eq!(series.get(&name), Some(&0.0), "{name}");
    }
    let sum = series[r#"tidings_lateness_seconds_sum{kind="message"}"#];
    assert!((60.0..120.0).contains(&sum), "{sum}");
    until_is(&mut daemon, "tidings_oldest_due_age_seconds", 0.0).await;
}

#[tokio::test]
async fn looks_are_counted_by_what_woke_the_daemon() {
    let world = World::with(&["message"]).await;
    let mut daemon = world.daemon().await;
    let wakes = |reason: &str| format!("tidings_wakes_total{{reason=\"{reason}\"}}");
    for reason in ["doubt", "plugins", "broker"] {
        until(&mut daemon, &wakes(reason), |wakes| wakes >= 1.0).await;
    }
    for reason in ["notification", "due", "sweep", "again", "released"] {
        until_is(&mut daemon, &wakes(reason), 0.0).await;
    }

    world
        .sql(r#"SELECT tidings.schedule('message', now() + interval '1 second', '{"routing_key": "a", "body": 1}')"#)
        .await;
    for reason in ["notification", "due", "lane"] {
        until(&mut daemon, &wakes(reason), |wakes| wakes >= 1.0).await;
    }
    until_is(&mut daemon, &wakes("sweep"), 0.0).await;
    assert!(daemon.stop().await.success());

    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 100).ready().await;
    until(&mut daemon, &wakes("sweep"), |wakes| wakes >= 2.0).await;
}

#[tokio::test]
async fn what_serves_and_what_answers_is_shown_as_it_is() {
    let world = World::empty().await;
    world.put("p.wasm", &well_behaved("p", &["p"], "one"));
    let (postgres, rabbitmq) = (Proxy::start(0, world.ports().0).await, Proxy::start(0, world.ports().1).await);
    let mut daemon = world
        .launch()
        .with("TIDINGS_DATABASE_URL", database_url(postgres.port, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq.port, &world.name))
        .ready()
        .await;
    let generation = r#"tidings_plugin_generation{plugin="p"}"#;
    for (name, value) in [
        (generation, 1.0),
        (r#"tidings_reloads_total{result="loaded"}"#, 1.0),
        (r#"tidings_reloads_total{result="refused"}"#, 0.0),
        (r#"tidings_connected{server="postgresql"}"#, 1.0),
        (r#"tidings_connected{server="rabbitmq"}"#, 1.0),
        ("tidings_broker_blocked", 0.0),
        ("tidings_listening", 1.0),
        (r#"tidings_breaker_open{kind="p"}"#, 0.0),
        (concat!("tidings_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
    ] {
        until_is(&mut daemon, name, value).await;
    }
    until(&mut daemon, "tidings_process_resident_memory_bytes", |bytes| bytes > 1e6).await;

    world.put("p.wasm", b"no plugin");
    until_is(&mut daemon, r#"tidings_reloads_total{result="refused"}"#, 1.0).await;
    until_is(&mut daemon, generation, 1.0).await;
    world.put("p.wasm", &trapping("p", &["p"]));
    // Only what serves has a number.
    until_is(&mut daemon, generation, 2.0).await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'p', now() FROM generate_series(1, 9)").await;
    until_is(&mut daemon, r#"tidings_breaker_open{kind="p"}"#, 1.0).await;
    until(&mut daemon, r#"tidings_plugin_memory_bytes{plugin="p"}"#, |bytes| bytes > 0.0).await;
    until(&mut daemon, r#"tidings_plugin_calls_total{plugin="p",kind="p",result="failed"}"#, |calls| calls >= 5.0)
        .await;
    std::fs::remove_file(world.plugin_dir.join("p.wasm")).expect("removed");
    until_is(&mut daemon, generation, 0.0).await;
    until_is(&mut daemon, r#"tidings_breaker_open{kind="p"}"#, 0.0).await;
    until_is(&mut daemon, r#"tidings_reloads_total{result="removed"}"#, 1.0).await;

    rabbitmq.set(Mode::Cut);
    until_is(&mut daemon, r#"tidings_connected{server="rabbitmq"}"#, 0.0).await;
    until_is(&mut daemon, r#"tidings_connected{server="postgresql"}"#, 1.0).await;
    postgres.set(Mode::Cut);
    until_is(&mut daemon, r#"tidings_connected{server="postgresql"}"#, 0.0).await;
    until_is(&mut daemon, "tidings_listening", 0.0).await;
    rabbitmq.set(Mode::Pass);
    postgres.set(Mode::Pass);
    for name in
        [r#"tidings_connected{server="postgresql"}"#, r#"tidings_connected{server="rabbitmq"}"#, "tidings_listening"]
    {
        until_is(&mut daemon, name, 1.0).await;
    }
}

#[tokio::test]
async fn a_scrape_costs_the_same_however_many_rows_wait() {
    let world = World::empty().await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, held)
             SELECT 'message', now() + interval '1 day', number % 10000 = 0 FROM generate_series(1, 100000) AS number",
        )
        .await;
    // Without statistics, when the planner knows least.
    let (pages, plan) = pages(&world, &checked("pg_stat_get_live_tuples"), "bigint, timestamptz", "1001, NULL").await;

    assert!(pages < 60, "{plan}");
}

/// The lines of a log, which must all be objects with what each line has.
fn objects(log: &str) -> Vec<Value> {
    let line = |line: &str| {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        for field in ["timestamp", "level", "target", "message"] {
            assert!(object[field].is_string(), "{field}: {line}");
        }
        object
    };
    log.lines().map(line).collect()
}

#[tokio::test]
async fn as_json_each_failure_is_one_line_with_row_kind_plugin_and_generation() {
    let world = World::with(&["misbehave"]).await;
    let mut daemon = world.launch().with("TIDINGS_LOG", "json").with("TIDINGS_SWEEP_MS", 600_000).start();
    daemon.wait_for_line("\"message\":\"ready\"").await;

    let mut failures = Vec::new();
    for (kind, says) in [("invalid", "parked"), ("trap", "could not build"), ("echo", "RabbitMQ did not take")] {
        let id: Uuid = world.value(&format!("SELECT tidings.schedule('{kind}', now())")).await;
        daemon.wait_for_line(says).await;
        failures.push((kind, says, id));
    }
    let many = "INSERT INTO tidings.schedules (kind, due_at) SELECT 'other', now() FROM generate_series(1, 1000)";
    world.sql(many).await;
    world.until("SELECT count(*) = 1000 FROM tidings.parked WHERE kind = 'other'").await;
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.ended().await.success());

    let objects = objects(&daemon.log());
    for (kind, says, id) in failures {
        let told = |object: &&Value| object["message"].as_str().is_some_and(|message| message.contains(says));
        let line = objects.iter().find(told).expect("it was waited for");
        assert_eq!(line["level"], "WARN", "{line}");
        assert_eq!(line["schedule.id"], id.to_string(), "{line}");
        assert_eq!(line["schedule.kind"], kind, "{line}");
        assert!(line["plugin"].as_str().is_some_and(|plugin| plugin.starts_with("misbehave@1+")), "{line}");
        assert_eq!(line["generation"], 1, "{line}");
    }
    // On a busy machine the rows may take longer than one of the log's whiles.
    let alike = objects.iter().filter(|object| object["schedule.kind"] == "other").count();
    assert!((199..1000).contains(&alike), "{alike} lines");
}

#[tokio::test]
async fn neither_payloads_nor_passwords_are_written_to_the_log() {
    for format in ["text", "json"] {
        let world = World::with(&["misbehave"]).await;
        let mut inbox = world.inbox(&["misbehave.echo"]).await;
        let postgres = Proxy::start(0, world.ports().0).await;
        let url = database_url(postgres.port, &world.name).replace("postgres@", "postgres:PASSWORD@");
        let mut daemon = world
            .launch()
            .with("RUST_LOG", "tidings=trace,plugin=trace")
            .with("TIDINGS_LOG", format)
            .with("TIDINGS_DATABASE_URL", url)
            .start();
        daemon.wait_for_line("ready").await;

        for kind in ["invalid", "trap", "skip", "retry", "ttl", "nobody", "echo"] {
            world
                .sql(&format!(
                    r#"SELECT tidings.schedule('{kind}', now(), '{{"a": "PAYLOAD"}}', headers => '{{"a": "PAYLOAD"}}')"#
                ))
                .await;
        }
        assert!(inbox.next().await.text().contains("PAYLOAD"));
        for line in ["its plugin cannot use it", "could not build", "RabbitMQ did not take", "no plugin serves it"] {
            daemon.wait_for_line(line).await;
        }
        postgres.set(Mode::Cut);
        daemon.wait_for_line("lost the connection for notifications").await;
        postgres.set(Mode::Pass);
        until_is(&mut daemon, "tidings_listening", 1.0).await;
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(daemon.ended().await.success());

        let log = daemon.log();
        assert!(!log.contains("PAYLOAD") && !log.contains("PASSWORD"), "{log}");
    }
}
