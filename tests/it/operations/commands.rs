//! The commands `schedule`, `cancel` and `next`, and what all commands have in common: `--json`, a closed standard
//! output, bad arguments. `explain` has its own file.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use harness::daemon::Launch;
use harness::world::{World, database_url};
use serde_json::{Value, json};

use crate::dead_letters::replay::suppress_pass_at_start;

/// How to run a command in a world.
fn launch_command(world: &World, arguments: &[&str]) -> Launch {
    world.launch().subcommand(arguments[0]).args(&arguments[1..])
}

/// Runs a command until it ends, without blocking the test's runtime.
async fn run_command(mut command: Command) -> Output {
    let ran = tokio::task::spawn_blocking(move || command.output()).await.expect("it does not panic");
    ran.expect("it runs")
}

/// Runs a command with `--json`, and returns its exit code and its JSON output; null if there is none.
pub(crate) async fn run_json(world: &World, arguments: &[&str]) -> (i32, Value) {
    let mut command = launch_command(world, arguments).args(["--json"]).command();
    command.stdin(Stdio::null());
    let ran = run_command(command).await;
    let answer = String::from_utf8(ran.stdout).expect("UTF-8");
    let answer = if answer.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{arguments:?}: {error}\n{answer}"))
    };
    (ran.status.code().expect("it was not killed"), answer)
}

/// The names of the fields of a JSON object.
pub(crate) fn field_names(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[tokio::test]
async fn schedule_writes_a_row_with_all_given_values_and_prints_its_id() {
    let world = World::empty().await;
    let arguments = ["schedule", "message", "--at", "2026-12-24T19:00:00+01:00", "--key", "k", "--subject", "s"];
    let more = ["--expires-in", "90s", "--payload", r#"{"a": 1.10}"#, "--header", "b=1=2", "--header", "c="];

    let (code, output) = world.tidings([&arguments[..], &more[..]].concat()).await;

    assert_eq!(code, 0, "{output}");
    let row: String = world
        .value("SELECT concat_ws(' ', id, kind, key, subject, extract(epoch FROM due_at)::int8, expires_at - due_at, payload, headers) FROM tidings.schedules")
        .await;
    assert_eq!(row, format!(r#"{output} message k s 1798135200 00:01:30 {{"a": 1.10}} {{"b": "1=2", "c": ""}}"#));

    let (code, answer) =
        run_json(&world, &["schedule", "message", "--in", "3days", "--expires-at", "9999-12-31T00:00:00Z"]).await;
    assert_eq!((code, field_names(&answer)), (0, vec!["id"]));
    let right: bool = world
        .value(&format!("SELECT due_at - now() BETWEEN interval '71 hours' AND interval '72 hours' FROM tidings.schedules WHERE id = '{}'", answer["id"].as_str().expect("an id")))
        .await;
    assert!(right);
}

#[tokio::test]
async fn schedule_reads_a_payload_from_a_file_or_from_standard_input() {
    let world = World::empty().await;
    let file = world.plugin_dir.join("payload.json");
    std::fs::write(&file, "{\"from\": \"a file\"}\n").expect("written");

    let (code, output) =
        world.tidings(["schedule", "message", "--in", "1h", "--payload", &format!("@{}", file.display())]).await;
    assert_eq!(code, 0, "{output}");
    let reading = launch_command(&world, &["schedule", "message", "--in", "2h", "--payload", "-"]);
    let mut child = reading.command().stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("it runs");
    child.stdin.take().expect("piped").write_all(b"[\"from standard input\"]").expect("written");
    assert!(child.wait().expect("it ends").success());

    let payloads: Vec<String> =
        world.value("SELECT array_agg(payload::text ORDER BY due_at) FROM tidings.schedules").await;
    assert_eq!(payloads, [r#"{"from": "a file"}"#, r#"["from standard input"]"#]);
}

#[tokio::test]
async fn a_row_scheduled_on_the_command_line_is_delivered_at_once_if_it_is_due() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;

    let payload = r#"{"routing_key": "k", "body": 1}"#;
    let (code, answer) = run_json(&world, &["schedule", "message", "--in", "0s", "--payload", payload]).await;

    assert_eq!(code, 0);
    // The sweep comes only every ten minutes, so the daemon was notified.
    assert_eq!(inbox.next().await.id().to_string(), answer["id"].as_str().expect("an id"));
}

#[tokio::test]
async fn schedule_with_a_pending_key_replaces_keeps_or_fails_as_asked() {
    let world = World::empty().await;
    let schedule = async |more: &[&str]| {
        run_json(&world, &[&["schedule", "message", "--in", "1h", "--key", "k"], more].concat()).await
    };
    let first = schedule(&[]).await.1;

    let (code, kept) = schedule(&["--on-conflict", "keep"]).await;
    assert_eq!((code, &kept), (0, &first));
    let (code, answer) = schedule(&["--on-conflict", "error"]).await;
    assert_eq!((code, answer), (1, Value::Null));
    let again = ["schedule", "message", "--in", "1h", "--key", "k", "--on-conflict", "error"];
    let (_, output) = world.tidings(again).await;
    let expected = format!(
        r#"tidings: key "k" of kind "message" is already scheduled, with id {}"#,
        first["id"].as_str().expect("an id")
    );
    assert_eq!(output, expected);
    let (code, replaced) = schedule(&[]).await;
    assert!(code == 0 && replaced != first, "{replaced}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 1);
}

#[tokio::test]
async fn invalid_arguments_are_reported_by_name_and_change_nothing() {
    let world = World::empty().await;
    let long = "k".repeat(256);
    let schedule = ["schedule", "message", "--in", "1h"];
    for (arguments, named) in [
        (&["schedule", "message"][..], "--at"),
        (&["schedule", "message", "--in", "soon"], "--in"),
        (&["schedule", "message", "--in", "-1h"], "--in"),
        (&["schedule", "message", "--at", "2026-12-24"], "--at"),
        (&["schedule", "message", "--at", "infinity"], "--at"),
        (&["schedule", "message", "--at", "1969-12-31T00:00:00Z"], "--at or --in: due_at must be"),
        (&["schedule", "message", "--in", "1h", "--at", "2026-12-24T00:00:00Z"], "--in"),
        (&["schedule", "Message!", "--in", "1h"], "KIND: kind must match"),
        (&[&schedule[..], &["--key", &long]].concat(), "the key: key must be 1 to 255 bytes"),
        (&[&schedule[..], &["--key", ""]].concat(), "the key: "),
        (&[&schedule[..], &["--subject", &long]].concat(), "--subject: "),
        (&[&schedule[..], &["--expires-at", "2026-01-01T00:00:00Z"]].concat(), "--expires-at or --expires-in: "),
        (&[&schedule[..], &["--expires-in", "0s"]].concat(), "--expires-at or --expires-in: "),
        (&[&schedule[..], &["--expires-in", "later"]].concat(), "--expires-in"),
        (&[&schedule[..], &["--payload", "{"]].concat(), "--payload is not JSON"),
        (&[&schedule[..], &["--payload", "@/nonexistent"]].concat(), "--payload: cannot read /nonexistent"),
        (&[&schedule[..], &["--payload", r#""\u0000""#]].concat(), "--payload: "),
        (&[&schedule[..], &["--header", "no value"]].concat(), "--header"),
        (&[&schedule[..], &["--header", "x-own=1"]].concat(), "--header: headers must not be named"),
        (&[&schedule[..], &["--on-conflict", "fight"]].concat(), "--on-conflict"),
        (&["cancel"], "--subject"),
        (&["cancel", "message"], "KEY"),
        (&["cancel", "message", "k", "--subject", "s"], "--subject"),
        (&["explain", "message"], "ID|KIND/KEY"),
        (&["next", "--within", "1"], "--within"),
        (&["next", "--limit", "0"], "--limit"),
        (&["pause"], "KIND"),
        (&["pause", "No!"], "KIND: kind must match"),
        (&["pause", "message", "--until", "2020-01-01T00:00:00Z"], "--until or --for: until must be in the future"),
        (&["pause", "message", "--for", "0s"], "--until or --for: "),
        (&["pause", "message", "--for", "1h", "--until", "2030-01-01T00:00:00Z"], "--until"),
        (&["resume"], "KIND"),
        (&["completions", "cmd.exe"], "cmd.exe"),
    ] {
        let (code, output) = world.tidings(arguments).await;
        assert!(code == 64 && output.contains(named), "{arguments:?}: {code}\n{output}");
        assert!(!output.contains("panicked"), "{arguments:?}:\n{output}");
    }
    let done = "SELECT (SELECT count(*) FROM tidings.schedules) + (SELECT count(*) FROM tidings.pauses)";
    assert_eq!(world.value::<i64>(done).await, 0);
}

#[tokio::test]
async fn cancel_removes_rows_by_key_or_subject_and_reports_when_there_were_none() {
    let world = World::empty().await;
    world
        .sql("SELECT tidings.schedule('a', now() + interval '1 hour', key => 'k' || n, subject => 's') FROM generate_series(1, 3) AS n")
        .await;

    assert_eq!(run_json(&world, &["cancel", "a", "k1"]).await, (0, json!({ "cancelled": 1 })));
    assert_eq!(run_json(&world, &["cancel", "a", "k1"]).await, (66, json!({ "cancelled": 0 })));
    let (code, output) = world.tidings(["cancel", "--subject", "s"]).await;
    assert_eq!((code, output.as_str()), (0, "2 rows cancelled"));
    let (code, output) = world.tidings(["cancel", "--subject", "s"]).await;
    assert_eq!((code, output.as_str()), (66, "nothing was pending"));
}

#[tokio::test]
async fn next_shows_the_next_due_rows_and_an_estimate_of_how_many_more_there_are() {
    let world = World::empty().await;
    let (code, output) = world.tidings(["next"]).await;
    assert_eq!((code, output.as_str()), (0, "nothing is due"));
    world
        .sql("INSERT INTO tidings.schedules (kind, key, due_at) SELECT 'a', 'k' || n, now() + n * interval '1 minute' FROM generate_series(1, 30) AS n")
        .await;
    world.sql("INSERT INTO tidings.schedules (kind, subject, due_at) VALUES ('b', 'about', now() + interval '90 seconds')").await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at, held) SELECT 'nobody', now(), true FROM generate_series(1, 2)").await;
    world.sql("INSERT INTO tidings.pauses (kind, reason) VALUES ('c', 'why not')").await;

    let (code, answer) = run_json(&world, &["next"]).await;
    assert_eq!(code, 0, "{answer}");
    assert_eq!(
        field_names(&answer),
        ["held", "limits", "more", "more_is_estimate", "now", "occurrences", "paused", "rows"]
    );
    assert_eq!((&answer["more"], &answer["more_is_estimate"]), (&json!(11), &json!(false)));
    let rows = answer["rows"].as_array().expect("a list");
    assert_eq!(rows.len(), 20);
    assert_eq!(field_names(&rows[0]), ["at", "attempts", "due_at", "held", "id", "key", "kind", "subject"]);
    assert_eq!((&rows[0]["key"], &rows[1]["subject"]), (&json!("k1"), &json!("about")));
    assert!(rows[0]["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{}", rows[0]);
    assert_eq!(answer["held"], json!([{ "kind": "nobody", "rows": 2, "or_more": false }]));
    assert_eq!(field_names(&answer["paused"][0]), ["by", "kind", "reason", "since", "until"]);

    let (_, answer) = run_json(&world, &["next", "--within", "200s", "--kind", "a"]).await;
    assert_eq!((answer["rows"].as_array().expect("a list").len(), &answer["more"]), (3, &json!(0)));
    assert_eq!((&answer["held"], &answer["paused"]), (&json!([]), &json!([])));
    let (_, output) = world.tidings(["next", "--limit", "2"]).await;
    for part in
        ["k1 ", "about", "in 1m", "2 rows, and 29 more", "held: 2 rows of the kind nobody", "paused: the kind c"]
    {
        assert!(output.contains(part), "{part}:\n{output}");
    }

    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'a', now() + interval '1 day' FROM generate_series(1, 5000)").await;
    world.sql("ANALYZE tidings.schedules").await;
    let (_, answer) = run_json(&world, &["next"]).await;
    assert_eq!(answer["more_is_estimate"], json!(true));
    assert!((3_000..7_000).contains(&answer["more"].as_u64().expect("a number")), "{}", answer["more"]);
}

#[tokio::test]
async fn a_producer_may_use_schedule_cancel_next_and_explain_but_not_pause() {
    let world = World::empty().await;
    let role = format!("r{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_producer")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('b')").await;
    let run_as_producer = async |arguments: &[&str]| {
        launch_command(&world, arguments).with("TIDINGS_DATABASE_URL", &url).run_to_end().await
    };

    for arguments in
        [&["schedule", "a", "--in", "1h", "--key", "k"][..], &["next"], &["explain", "a/k"], &["cancel", "a", "k"]]
    {
        let (code, output) = run_as_producer(arguments).await;
        assert_eq!(code, 0, "{arguments:?}: {output}");
    }
    for arguments in [&["pause", "a"][..], &["resume", "b"]] {
        let (code, output) = run_as_producer(arguments).await;
        assert!(code == 1 && output.contains("GRANT tidings_daemon TO"), "{arguments:?}: {output}");
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.pauses").await, 1);
}

#[tokio::test]
async fn commands_on_a_database_without_the_schema_exit_with_65() {
    let world = World::empty().await;
    world.sql("DROP SCHEMA tidings CASCADE").await;

    for arguments in
        [&["next"][..], &["explain", "a/k"], &["schedule", "a", "--in", "1h"], &["cancel", "a", "k"], &["pause", "a"]]
    {
        let (code, output) = world.tidings(arguments).await;
        assert!(code == 65 && output.contains("run `tidings migrate` first"), "{arguments:?}: {code} {output}");
    }
}

#[tokio::test]
async fn every_command_with_output_prints_one_json_document_with_the_flag_json() {
    let world = World::with_plugins(&["message"]).await;
    suppress_pass_at_start(&world).await;
    let mut daemon = world.start_daemon().await;
    let addr = daemon.http_addr().await;
    world.sql("SELECT tidings.schedule('message', now(), '{}', key => 'parked')").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('message')").await;
    let wasm = World::built_plugin("message");
    let wasm = wasm.to_str().expect("UTF-8");
    let fixtures = world.plugin_dir.with_extension("fixtures");
    std::fs::create_dir_all(&fixtures).expect("made");
    std::fs::write(fixtures.join("one.json"), r#"{"row": {"kind": "message", "payload": {}}, "expect": null}"#)
        .expect("written");
    let fixtures = fixtures.to_str().expect("UTF-8");

    let (code, answer) = run_json(&world, &["migrate"]).await;
    assert_eq!((code, field_names(&answer), &answer["ran"]), (0, vec!["database", "ran"], &json!(0)));
    let (code, answer) = run_json(&world, &["dead", "list"]).await;
    assert_eq!((code, answer), (0, json!({ "waiting": 0, "looked_at": 0, "listed": 0, "groups": [] })));
    let (code, answer) = run_json(&world, &["dead", "replay", "--dry-run"]).await;
    assert_eq!((code, field_names(&answer)), (0, vec!["dry_run", "expired", "left", "letters", "parked", "replayed"]));
    assert_eq!(run_json(&world, &["dead", "drop", "--all"]).await, (0, json!({ "dropped": 0 })));
    let (code, answer) = run_json(&world, &["parked", "list"]).await;
    assert_eq!((code, field_names(&answer), &answer["letters"]), (0, vec!["letters", "rows"], &json!([])));
    assert_eq!(field_names(&answer["rows"][0]), ["id", "key", "kind", "parked_at", "plugin", "reason"]);
    assert_eq!(
        run_json(&world, &["parked", "retry", "--all"]).await,
        (0, json!({ "rows": 1, "letters": 0, "stay": [] }))
    );
    world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
    assert_eq!(run_json(&world, &["parked", "drop", "--all"]).await, (0, json!({ "rows": 0, "letters": 0 })));
    let (code, answer) = run_json(&world, &["plugin", "check", wasm]).await;
    let fields = ["digest", "file", "imports", "inert", "kinds", "limits", "plugin", "size_bytes"];
    assert_eq!((code, field_names(&answer)), (0, fields.to_vec()));
    assert_eq!(field_names(&answer["limits"]), ["cpu_ms", "memory_mib", "output_kib", "wall_ms"]);
    assert_eq!(field_names(&answer["kinds"][0]), ["example", "kind", "payload_schema", "summary"]);
    let (code, answer) = run_json(&world, &["plugin", "test", wasm, "--fixtures", fixtures]).await;
    assert_eq!(
        (code, field_names(&answer), &answer["failed"]),
        (1, vec!["failed", "fixtures", "passed", "plugin"], &json!(1))
    );
    let fields = ["difference", "fixture", "instructions", "memory_bytes", "result", "took_ms"];
    assert_eq!(
        (field_names(&answer["fixtures"][0]), &answer["fixtures"][0]["result"]),
        (fields.to_vec(), &json!("failed"))
    );
    let (code, answer) = run_json(&world, &["plugin", "list", "--http-addr", &addr]).await;
    assert_eq!((code, field_names(&answer)), (0, vec!["held", "paused", "plugins"]));
    assert_eq!((&answer["paused"][0]["kind"], &answer["held"]), (&json!("message"), &json!([])));
    let (code, output) = world.tidings(["plugin", "list", "--http-addr", &addr]).await;
    assert!(code == 0 && output.contains("paused: the kind message is paused by postgres"), "{output}");
    let (code, answer) = run_json(&world, &["doctor"]).await;
    assert_eq!((code, field_names(&answer), &answer["failed"]), (0, vec!["checks", "failed"], &json!(false)));
    assert_eq!(field_names(&answer["checks"][0]), ["level", "says"]);
    assert!(answer["checks"].as_array().is_some_and(|checks| checks.len() > 20), "{answer}");
}

#[tokio::test]
async fn commands_do_not_panic_when_their_output_is_closed() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    let addr = daemon.http_addr().await;
    let wasm = World::built_plugin("message");
    let wasm = wasm.to_str().expect("UTF-8");

    for arguments in [
        &["next"][..],
        &["next", "--json"],
        &["schedule", "message", "--in", "1h", "--key", "k"],
        &["explain", "message/k"],
        &["explain", "message/never"],
        &["cancel", "message", "k"],
        &["pause", "message"],
        &["resume", "message"],
        &["completions", "bash"],
        &["doctor"],
        &["migrate"],
        &["dead", "list"],
        &["parked", "list"],
        &["plugin", "list", "--http-addr", &addr],
        &["plugin", "check", wasm],
        &["--help"],
        &["schedule", "message", "--in", "soon"],
    ] {
        let closed = || {
            let (reader, writer) = std::io::pipe().expect("a pipe");
            drop(reader);
            writer
        };
        let mut unread = launch_command(&world, arguments).command();
        unread.stdin(Stdio::null()).stdout(closed()).stderr(Stdio::piped());
        let ran = tokio::task::spawn_blocking(move || unread.spawn()?.wait_with_output()).await.expect("no panic");
        let ran = ran.expect("it runs");
        let stderr = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.code().is_some_and(|code| code != 101), "{arguments:?}: {} {stderr}", ran.status);
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
        // Standard error is closed as well, as with `2>&1 | head`.
        let mut unread = launch_command(&world, arguments).command();
        unread.stdin(Stdio::null()).stdout(closed()).stderr(closed());
        let status = tokio::task::spawn_blocking(move || unread.status()).await.expect("no panic").expect("it runs");
        assert!(status.code().is_some_and(|code| code != 101), "{arguments:?}: {status}");
    }
}

#[tokio::test]
async fn completions_for_every_shell_contain_the_commands_and_flags() {
    let world = World::empty().await;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, output) = world.tidings(["completions", shell]).await;
        assert!(code == 0 && output.contains("explain") && output.contains("on-conflict"), "{shell}: {code}");
    }
}
