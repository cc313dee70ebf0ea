//! Metrics and the log: the numbers are right, the metrics of the dashboard and the alerts exist, the content of rows
//! creates no series, and no payload or password is written to the log.

use std::collections::{BTreeMap, BTreeSet};

use harness::daemon::Daemon;
use harness::guests::{trapping, well_behaved};
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url};
use harness::{eventually, repository};
use serde_json::Value;
use uuid::Uuid;

use crate::on_time::queries::{count_pages, find_checked_query};

/// Reads `/metrics`: the value of each series by its name and labels.
pub(crate) async fn scrape(daemon: &mut Daemon) -> BTreeMap<String, f64> {
    scrape_at(&daemon.http_addr().await).await
}

/// [`scrape`] for a daemon of which only the address is known.
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

/// Waits until the series `name` has a value for which `right` returns true, and returns the value.
async fn wait_for_series(daemon: &mut Daemon, name: &str, right: impl Fn(f64) -> bool) -> f64 {
    eventually(name, async || scrape(daemon).await.get(name).copied().filter(|value| right(*value))).await
}

/// Waits until the series `name` has exactly this value.
pub(crate) async fn wait_for_value(daemon: &mut Daemon, name: &str, value: f64) {
    wait_for_series(daemon, name, |now| now.total_cmp(&value).is_eq()).await;
}

/// The names of the daemon's metrics in a Prometheus expression.
fn find_metric_names(expression: &str) -> impl Iterator<Item = String> {
    let words = expression.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
    words.filter(|word| word.starts_with("tidings_")).map(str::to_owned)
}

/// Collects every Prometheus expression in the dashboard.
fn collect_expressions(dashboard: &Value, found: &mut Vec<String>) {
    match dashboard {
        Value::Object(object) => {
            found.extend(object.get("expr").and_then(Value::as_str).map(str::to_owned));
            object.values().for_each(|value| collect_expressions(value, found));
        }
        Value::Array(array) => array.iter().for_each(|value| collect_expressions(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn all_metrics_of_the_dashboard_and_the_alerts_exist_from_the_start() {
    let deploy = repository().join("host/deploy");
    let read = |file: &str| std::fs::read_to_string(deploy.join(file)).expect("it is there");
    let alerts = read("alerts.yml");
    let mut asked: Vec<String> =
        alerts.lines().filter(|line| line.trim().starts_with("expr: ")).map(str::to_owned).collect();
    let alerts = asked.len();
    let dashboard: Value = serde_json::from_str(&read("grafana/dashboards/tidings.json")).expect("JSON");
    collect_expressions(&dashboard, &mut asked);
    assert!(alerts > 10 && asked.len() > alerts + 30, "{asked:?}");
    let world = World::with_plugins(&["message"]).await;
    // The metrics of an intake exist if there is one.
    let mut daemon = crate::intake::start(&world).await;

    let existing = scrape(&mut daemon).await;

    let existing: BTreeSet<&str> = existing.keys().map(|name| name.split('{').next().expect("a name")).collect();
    for expression in &asked {
        for name in find_metric_names(expression) {
            assert!(existing.contains(&*name), "{name} of {expression} is not among {existing:?}");
        }
    }
}

#[tokio::test]
async fn metrics_count_rows_by_kind_and_outcome_and_plugin_calls_by_result() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["misbehave.echo"]).await;
    let mut daemon = world.start_daemon().await;
    wait_for_value(&mut daemon, r#"tidings_deliveries_total{kind="echo",outcome="delivered"}"#, 0.0).await;
    wait_for_value(&mut daemon, "tidings_next_due_seconds", f64::INFINITY).await;

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
        wait_for_value(
            &mut daemon,
            &format!("tidings_deliveries_total{{kind=\"{kind}\",outcome=\"{outcome}\"}}"),
            rows,
        )
        .await;
    }
    // No queue is bound for this kind, so its message is returned again and again.
    wait_for_series(&mut daemon, r#"tidings_deliveries_total{kind="config",outcome="refused"}"#, |rows| rows >= 1.0)
        .await;
    for (kind, result, calls) in
        [("echo", "built", 3.0), ("skip", "skipped", 2.0), ("invalid", "invalid", 1.0), ("retry", "retry", 1.0)]
    {
        let name = format!("tidings_plugin_calls_total{{plugin=\"misbehave\",kind=\"{kind}\",result=\"{result}\"}}");
        wait_for_value(&mut daemon, &name, calls).await;
    }
    wait_for_value(&mut daemon, r#"tidings_expired_total{where="row"}"#, 2.0).await;
    wait_for_value(&mut daemon, r#"tidings_lateness_seconds_count{kind="echo"}"#, 3.0).await;
    wait_for_series(&mut daemon, r#"tidings_plugin_call_seconds_count{plugin="misbehave"}"#, |calls| calls >= 8.0)
        .await;
    let claims = wait_for_series(&mut daemon, "tidings_claims_total", |claims| claims >= 1.0).await;
    wait_for_series(&mut daemon, "tidings_claimed_rows_total", |rows| rows >= claims.max(10.0)).await;
    wait_for_series(&mut daemon, "tidings_confirm_seconds_count", |batches| batches >= 1.0).await;
    // Three rows are pending: one retries in an hour, one is refused, one is held. PostgreSQL's statistics are delayed.
    for (name, rows) in [("tidings_pending", 3.0), ("tidings_held", 1.0), ("tidings_parked", 1.0)] {
        wait_for_value(&mut daemon, name, rows).await;
    }
    wait_for_series(&mut daemon, "tidings_next_due_seconds", |seconds| seconds <= 3600.0).await;
    // Kinds that are not served create no series.
    let series = scrape(&mut daemon).await;
    assert!(!series.keys().any(|name| name.contains("nobody")), "{series:?}");
}

#[tokio::test]
async fn lateness_is_counted_in_the_right_bucket_and_the_oldest_due_row_has_an_age() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let row = r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
                 VALUES ('message', now() - interval '60 s', now() - interval '60 s', '{"routing_key": "a", "body": 1}')"#;
    world.sql(row).await;
    // Another transaction locks the row, so that the daemon cannot deliver it.
    let mut busy = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules FOR UPDATE").execute(&mut *busy).await.expect("locked");
    let mut daemon = world.start_daemon().await;

    wait_for_series(&mut daemon, "tidings_oldest_due_age_seconds", |age| (60.0..120.0).contains(&age)).await;
    busy.rollback().await.expect("rolled back");
    inbox.next().await;

    wait_for_value(&mut daemon, r#"tidings_lateness_seconds_bucket{kind="message",le="120"}"#, 1.0).await;
    let series = scrape(&mut daemon).await;
    for class in ["0.001", "1", "30"] {
        let name = format!("tidings_lateness_seconds_bucket{{kind=\"message\",le=\"{class}\"}}");
        assert_eq!(series.get(&name), Some(&0.0), "{name}");
    }
    let sum = series[r#"tidings_lateness_seconds_sum{kind="message"}"#];
    assert!((60.0..120.0).contains(&sum), "{sum}");
    wait_for_value(&mut daemon, "tidings_oldest_due_age_seconds", 0.0).await;
}

#[tokio::test]
async fn metrics_count_wakes_by_reason() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    let wakes = |reason: &str| format!("tidings_wakes_total{{reason=\"{reason}\"}}");
    for reason in ["doubt", "plugins", "broker"] {
        wait_for_series(&mut daemon, &wakes(reason), |wakes| wakes >= 1.0).await;
    }
    for reason in ["notification", "due", "sweep", "again", "released"] {
        wait_for_value(&mut daemon, &wakes(reason), 0.0).await;
    }

    world
        .sql(r#"SELECT tidings.schedule('message', now() + interval '1 second', '{"routing_key": "a", "body": 1}')"#)
        .await;
    for reason in ["notification", "due", "lane"] {
        wait_for_series(&mut daemon, &wakes(reason), |wakes| wakes >= 1.0).await;
    }
    wait_for_value(&mut daemon, &wakes("sweep"), 0.0).await;
    assert!(daemon.stop().await.success());

    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 100).start_ready().await;
    wait_for_series(&mut daemon, &wakes("sweep"), |wakes| wakes >= 2.0).await;
}

#[tokio::test]
async fn metrics_show_loaded_plugins_open_breakers_and_connected_servers() {
    let world = World::empty().await;
    world.put("p.wasm", &well_behaved("p", &["p"], "one"));
    let (postgres, rabbitmq) = (Proxy::start(0, world.ports().0).await, Proxy::start(0, world.ports().1).await);
    let mut daemon = world
        .launch()
        .with("TIDINGS_DATABASE_URL", database_url(postgres.port, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq.port, &world.name))
        .start_ready()
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
        wait_for_value(&mut daemon, name, value).await;
    }
    wait_for_series(&mut daemon, "tidings_process_resident_memory_bytes", |bytes| bytes > 1e6).await;

    world.put("p.wasm", b"no plugin");
    wait_for_value(&mut daemon, r#"tidings_reloads_total{result="refused"}"#, 1.0).await;
    wait_for_value(&mut daemon, generation, 1.0).await;
    world.put("p.wasm", &trapping("p", &["p"]));
    // Only a loaded version gets a generation number.
    wait_for_value(&mut daemon, generation, 2.0).await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'p', now() FROM generate_series(1, 9)").await;
    wait_for_value(&mut daemon, r#"tidings_breaker_open{kind="p"}"#, 1.0).await;
    wait_for_series(&mut daemon, r#"tidings_plugin_memory_bytes{plugin="p"}"#, |bytes| bytes > 0.0).await;
    wait_for_series(&mut daemon, r#"tidings_plugin_calls_total{plugin="p",kind="p",result="failed"}"#, |calls| {
        calls >= 5.0
    })
    .await;
    std::fs::remove_file(world.plugin_dir.join("p.wasm")).expect("removed");
    wait_for_value(&mut daemon, generation, 0.0).await;
    wait_for_value(&mut daemon, r#"tidings_breaker_open{kind="p"}"#, 0.0).await;
    wait_for_value(&mut daemon, r#"tidings_reloads_total{result="removed"}"#, 1.0).await;

    rabbitmq.set(Mode::Cut);
    wait_for_value(&mut daemon, r#"tidings_connected{server="rabbitmq"}"#, 0.0).await;
    wait_for_value(&mut daemon, r#"tidings_connected{server="postgresql"}"#, 1.0).await;
    postgres.set(Mode::Cut);
    wait_for_value(&mut daemon, r#"tidings_connected{server="postgresql"}"#, 0.0).await;
    wait_for_value(&mut daemon, "tidings_listening", 0.0).await;
    rabbitmq.set(Mode::Pass);
    postgres.set(Mode::Pass);
    for name in
        [r#"tidings_connected{server="postgresql"}"#, r#"tidings_connected{server="rabbitmq"}"#, "tidings_listening"]
    {
        wait_for_value(&mut daemon, name, 1.0).await;
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
    // The table has no planner statistics, which is the worst case.
    let (pages, plan) =
        count_pages(&world, &find_checked_query("pg_stat_get_live_tuples"), "bigint, timestamptz", "1001, NULL").await;

    assert!(pages < 60, "{plan}");
}

/// Parses the lines of a JSON log, and checks that each has the common fields.
fn parse_json_lines(log: &str) -> Vec<Value> {
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
async fn in_a_json_log_each_failure_is_one_line_with_row_kind_plugin_and_generation() {
    let world = World::with_plugins(&["misbehave"]).await;
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
    world.wait_until("SELECT count(*) = 1000 FROM tidings.parked WHERE kind = 'other'").await;
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.wait_for_end().await.success());

    let objects = parse_json_lines(&daemon.log());
    for (kind, says, id) in failures {
        let has_message = |object: &&Value| object["message"].as_str().is_some_and(|message| message.contains(says));
        let line = objects.iter().find(has_message).expect("it was waited for");
        assert_eq!(line["level"], "WARN", "{line}");
        assert_eq!(line["schedule.id"], id.to_string(), "{line}");
        assert_eq!(line["schedule.kind"], kind, "{line}");
        assert!(line["plugin"].as_str().is_some_and(|plugin| plugin.starts_with("misbehave@1+")), "{line}");
        assert_eq!(line["generation"], 1, "{line}");
    }
    // On a busy machine the rows may take longer than one of the periods in which the log limits repeated lines.
    let alike = objects.iter().filter(|object| object["schedule.kind"] == "other").count();
    assert!((199..1000).contains(&alike), "{alike} lines");
}

#[tokio::test]
async fn neither_payloads_nor_passwords_are_written_to_the_log() {
    for format in ["text", "json"] {
        let world = World::with_plugins(&["misbehave"]).await;
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
        wait_for_value(&mut daemon, "tidings_listening", 1.0).await;
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(daemon.wait_for_end().await.success());

        let log = daemon.log();
        assert!(!log.contains("PAYLOAD") && !log.contains("PASSWORD"), "{log}");
    }
}
