//! The HTTP API under the page: reading needs no token, acting needs the token, and every other request is refused with
//! an error and without effect.

use harness::consumer::Inbox;
use harness::daemon::Daemon;
use harness::world::World;
use serde_json::{Value, json};
use ureq::AsSendBody;
use ureq::http::Request;

use crate::dead_letters::replay::{
    count_messages, launch_with_hourly_passes, reject_next, schedule_message, suppress_pass_at_start,
    wait_for_message_count,
};

/// The token of the daemons of these tests.
pub(crate) const TOKEN: &str = "a-token-of-the-tests";

/// Sends a request, and returns the status and the JSON body of the response.
pub(crate) async fn send_request<B: AsSendBody + Send + 'static>(request: Request<B>) -> (u16, Value) {
    let asked = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).build().into();
        let mut answer = agent.run(request).expect("an answer");
        let body = answer.body_mut().read_to_string().expect("text");
        (answer.status().as_u16(), serde_json::from_str(&body).unwrap_or_else(|_| panic!("not JSON: {body}")))
    });
    asked.await.expect("asked")
}

/// A POST request with the token and a JSON body.
pub(crate) fn action_request(daemon: &str, path: &str, body: &str) -> Request<Vec<u8>> {
    let request = Request::post(format!("http://{daemon}{path}")).header("Authorization", format!("Bearer {TOKEN}"));
    let request = request.header("Content-Type", "application/json");
    request.body(body.as_bytes().to_vec()).expect("a request")
}

/// Adds or replaces a header of a request.
fn with_header<B>(name: &'static str, value: &str, mut request: Request<B>) -> Request<B> {
    let name = ureq::http::HeaderName::from_bytes(name.as_bytes()).expect("a name");
    request.headers_mut().insert(name, value.parse().expect("a value"));
    request
}

pub(crate) async fn post_action(daemon: &str, path: &str, body: Value) -> (u16, Value) {
    send_request(action_request(daemon, path, &body.to_string())).await
}

pub(crate) async fn get_json(daemon: &str, path: &str) -> (u16, Value) {
    send_request(Request::get(format!("http://{daemon}{path}")).body(()).expect("a request")).await
}

/// Starts a daemon in a new world with a parked row and a dead letter. Returns its address and the two ids, too.
async fn start_with_parked_and_dead() -> (World, Daemon, String, [String; 2], Inbox) {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    suppress_pass_at_start(&world).await;
    let mut daemon = launch_with_hourly_passes(&world).with("TIDINGS_HTTP_TOKEN", TOKEN).start_ready().await;
    let row = schedule_message(&world, r#"{"no": "routing key"}"#).await;
    let letter = schedule_message(&world, r#"{"routing_key": "k", "body": "letter"}"#).await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.parked)").await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
    let addr = daemon.http_addr().await;
    (world, daemon, addr, [row.to_string(), letter.to_string()], inbox)
}

/// Checks that the parked row and the dead letter are still there and no kind is paused.
async fn check_nothing_was_done(world: &World) {
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.parked").await, 1);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.pauses").await, 0);
    assert_eq!(count_messages(world, "tidings.dead").await, 1);
}

#[tokio::test]
async fn invalid_requests_are_refused_with_an_error_and_change_nothing() {
    let (world, daemon, addr, [row, _], _inbox) = start_with_parked_and_dead().await;
    let large = format!(r#"{{"ids": ["{}"]}}"#, "x".repeat(70_000));
    let long = json!({ "reason": "x".repeat(5_000) }).to_string();
    for (path, body, status, part) in [
        ("/api/dead/drop", "", 400, "say which"),
        ("/api/dead/drop", "{}", 400, "say which"),
        ("/api/dead/drop", r#"{"all": false}"#, 400, "say which"),
        ("/api/dead/drop", r#"{"ids": []}"#, 400, "say which"),
        ("/api/dead/drop", r#"{"ids": ["a"], "all": true}"#, 400, "say which"),
        ("/api/dead/drop", r#"{"all": true, "kind": "message"}"#, 400, "unknown field `kind`"),
        ("/api/dead/drop", r#"{"all": "yes"}"#, 400, "expected a boolean"),
        ("/api/dead/drop", r#"{"ids": "a"}"#, 400, "expected a sequence"),
        ("/api/dead/drop", "all", 400, "not the JSON"),
        ("/api/dead/drop", r#"{"all": true} {"all": true}"#, 400, "trailing characters"),
        ("/api/dead/drop", &large, 413, "64 KiB"),
        ("/api/dead/drop", r#"{"ids": ["nobody"]}"#, 404, "no such letter"),
        ("/api/dead/replay", r#"{"ids": ["nobody"]}"#, 404, "no such letter"),
        ("/api/parked-letters/retry", r#"{"ids": ["nobody"]}"#, 404, "no such letter"),
        ("/api/parked-letters/drop", r#"{"ids": ["nobody"]}"#, 404, "no such letter"),
        ("/api/parked/drop", r#"{"ids": ["nobody"]}"#, 400, "not the id of a row"),
        ("/api/parked/retry", r#"{"ids": ["0199a6b2-1c2d-7000-8000-000000000001"]}"#, 404, "no such row"),
        ("/api/parked/nobody/drop", "{}", 400, "not the id of a row"),
        ("/api/parked/all/drop", "", 400, "not the id of a row"),
        ("/api/parked/0199a6b2-1c2d-7000-8000-000000000001/drop", "", 404, "no such row"),
        ("/api/parked/%ff/drop", "", 400, "not UTF-8"),
        (&format!("/api/parked/{row}/drop"), r#"{"all": true}"#, 400, "unknown field"),
        (&format!("/api/parked/{row}/drop"), "[]x", 400, "not the JSON"),
        ("/api/kinds/No%20Kind/pause", "{}", 400, "kind must match"),
        ("/api/kinds/%00/pause", "{}", 400, "0x00"),
        ("/api/kinds/message/pause", r#"{"for_seconds": 0}"#, 400, "until must be in the future"),
        ("/api/kinds/message/pause", r#"{"for_seconds": -1}"#, 400, "expected u32"),
        ("/api/kinds/message/pause", r#"{"for_seconds": 1e99}"#, 400, "expected u32"),
        ("/api/kinds/message/pause", r#"{"for_seconds": "1"}"#, 400, "expected u32"),
        ("/api/kinds/message/pause", r#"{"reason": "\u0000"}"#, 400, "0x00"),
        ("/api/kinds/message/pause", &long, 400, "reason must be"),
        ("/api/kinds/message/pause", r#"{"until": "tomorrow"}"#, 400, "unknown field `until`"),
        ("/api/kinds/message/resume", "{}", 404, "not paused"),
        ("/api/kinds/message/resume", r#"{"now": 1}"#, 400, "unknown field"),
        ("/api/kinds//pause", "", 400, "kind must match"),
        ("/api/overview", "{}", 405, "POST is not allowed here"),
        ("/api", "{}", 404, "there is nothing at /api"),
        ("/", "", 405, "POST is not allowed here"),
    ] {
        let (answered, answer) = send_request(action_request(&addr, path, body)).await;
        let sentence = answer["error"].as_str().unwrap_or_else(|| panic!("{path} {body}: {answer}"));
        assert_eq!(answered, status, "{path} {body}: {sentence}");
        assert!(sentence.contains(part), "{path} {body}: {sentence}");
    }
    for (path, status, part) in [
        ("/api/rows", 400, "say which row"),
        ("/api/rows?which", 400, "neither an id"),
        ("/api/rows?which=", 400, "neither an id"),
        ("/api/rows?which=message", 400, "neither an id"),
        ("/api/rows?kind=message", 400, "say which row"),
        ("/api/rows?which=a/b&which=a/c", 400, "say which row"),
        ("/api/rows?which=a/%00", 400, "0x00"),
        ("/api/rows?which=a/%ff", 404, "nothing is known"),
        ("/api/rows?which=message/nobody", 404, "nothing is known of the kind message with the key nobody"),
        ("/api/rows?which=0199a6b2-1c2d-7000-8000-000000000001", 404, "nothing is known of 0199a6b2"),
        ("/api/nothing", 404, "there is nothing at /api/nothing"),
        ("/index.html", 404, "the page is at /"),
        ("/api/dead/drop", 405, "act with POST"),
        ("/api/kinds/message/pause", 405, "act with POST"),
    ] {
        let (answered, answer) = get_json(&addr, path).await;
        let sentence = answer["error"].as_str().unwrap_or_else(|| panic!("{path}: {answer}"));
        assert_eq!(answered, status, "{path}: {sentence}");
        assert!(sentence.contains(part), "{path}: {sentence}");
    }
    let mut other = action_request(&addr, "/api/dead/drop", r#"{"all": true}"#);
    other.headers_mut().insert("Content-Type", "text/plain".parse().expect("a header"));
    let (status, answer) = send_request(other).await;
    assert!(
        status == 415 && answer["error"].as_str().is_some_and(|error| error.contains("application/json")),
        "{answer}"
    );
    let other = Request::delete(format!("http://{addr}/api/dead/drop")).body(()).expect("a request");
    let (status, answer) = send_request(other).await;
    assert!(status == 405 && answer["error"].as_str().is_some_and(|error| error.contains("DELETE")), "{answer}");
    check_nothing_was_done(&world).await;
    drop(daemon);
}

#[tokio::test]
async fn actions_require_the_right_token_and_tokens_are_never_logged() {
    let (world, mut daemon, addr, [row, _], _inbox) = start_with_parked_and_dead().await;
    let path = format!("/api/parked/{row}/drop");
    for (given, part) in [
        (None, "a token is needed"),
        (Some("Bearer wrong-token-of-somebody"), "the token is wrong"),
        (Some("Bearer "), "a token is needed"),
        (Some("bearer A-TOKEN-OF-THE-TESTS"), "the token is wrong"),
        (Some("Basic a-token-of-the-tests"), "a token is needed"),
        (Some("a-token-of-the-tests"), "a token is needed"),
        (Some("Bearer  a-token-of-the-tests"), "the token is wrong"),
    ] {
        for path in ["/api/token", &path, "/api/dead/drop", "/api/kinds/message/pause"] {
            let mut request = action_request(&addr, path, r#"{"all": true}"#);
            request.headers_mut().remove("Authorization");
            if let Some(given) = given {
                request.headers_mut().insert("Authorization", given.parse().expect("a header"));
            }
            let (status, answer) = send_request(request).await;
            let sentence = answer["error"].as_str().expect("a sentence");
            assert!(status == 401 && sentence.contains(part), "{given:?} {path}: {status} {sentence}");
        }
    }
    check_nothing_was_done(&world).await;
    let (status, answer) = post_action(&addr, "/api/token", json!({})).await;
    assert_eq!((status, &answer["says"]), (200, &"the token is right".into()), "{answer}");
    let (status, answer) = post_action(&addr, &path, json!({})).await;
    assert_eq!((status, &answer["says"]), (200, &"1 row dropped for good".into()), "{answer}");
    daemon.wait_for_line("by hand: 1 row dropped for good").await;
    let log = daemon.log();
    assert!(log.contains("somebody wanted to act with a wrong token"), "{log}");
    assert!(!log.contains(TOKEN) && !log.contains("wrong-token-of-somebody"), "{log}");
}

#[tokio::test]
async fn a_daemon_without_a_token_allows_no_actions() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.launch().with("TIDINGS_HTTP_TOKEN", "").start_ready().await;
    let addr = daemon.http_addr().await;

    let (status, answer) = post_action(&addr, "/api/kinds/message/pause", json!({})).await;

    assert_eq!(status, 403, "{answer}");
    assert!(answer["error"].as_str().is_some_and(|error| error.contains("TIDINGS_HTTP_TOKEN")), "{answer}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.pauses").await, 0);
    let (status, answer) = get_json(&addr, "/api/overview").await;
    assert_eq!((status, &answer["actions"], &answer["ready"]), (200, &false.into(), &true.into()), "{answer}");
}

#[tokio::test]
async fn a_token_that_is_too_short_or_not_printable_is_refused_without_showing_it() {
    let world = World::empty().await;
    for (token, part) in [("guess-me", "it needs 16 to 256"), ("guess-me with-a-space", "printable ASCII")] {
        let (code, output) = world.launch().with("TIDINGS_HTTP_TOKEN", token).run_to_end().await;
        assert!(code == 64 && output.contains("TIDINGS_HTTP_TOKEN has") && output.contains(part), "{code} {output}");
        assert!(!output.contains("guess-me"), "{output}");
    }
    let (_, help) = world.launch().with("TIDINGS_HTTP_TOKEN", TOKEN).args(["--help"]).run_to_end().await;
    assert!(help.contains("TIDINGS_HTTP_TOKEN") && !help.contains(TOKEN), "{help}");
}

#[tokio::test]
async fn requests_from_another_origin_are_refused() {
    let (world, daemon, addr, ..) = start_with_parked_and_dead().await;
    let own = format!("http://{addr}");
    for (name, value, allowed) in [
        ("Origin", &*own, true),
        ("Sec-Fetch-Site", "same-origin", true),
        ("Sec-Fetch-Site", "none", true),
        ("Origin", "http://evil.example", false),
        ("Origin", "null", false),
        ("Sec-Fetch-Site", "cross-site", false),
        ("Sec-Fetch-Site", "same-site", false),
        // A name that an attacker's DNS points at this machine.
        ("Host", "evil.example", false),
    ] {
        let look = with_header(name, value, Request::get(format!("{own}/api/overview")).body(()).expect("a request"));
        let (status, answer) = send_request(look).await;
        assert_eq!(status, if allowed { 200 } else { 403 }, "{name}: {value}: {answer}");
        assert_eq!(answer["error"].is_string(), !allowed, "{answer}");
        let (status, answer) =
            send_request(with_header(name, value, action_request(&addr, "/api/dead/drop", r#"{"ids": ["nobody"]}"#)))
                .await;
        assert_eq!(status, if allowed { 404 } else { 403 }, "{name}: {value}: {answer}");
    }
    check_nothing_was_done(&world).await;
    // Endpoints for machines accept any host name.
    let request = Request::get(format!("{own}/readyz")).header("Host", "tidings.example").body(());
    assert_eq!(send_request(request.expect("a request")).await.0, 200);
    drop(daemon);
}

#[tokio::test]
async fn the_page_may_load_nothing_from_other_hosts_and_may_not_be_framed() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    let url = format!("http://{}/", daemon.http_addr().await);
    for path in ["", "page.js", "plots.js", "page.css", "api/overview"] {
        let answer = ureq::get(format!("{url}{path}")).call().expect("an answer");
        let header = |name: &str| answer.headers()[name].to_str().expect("text").to_owned();
        let policy = header("content-security-policy");
        for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"] {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(header("referrer-policy"), "no-referrer", "{path}");
        assert!(!answer.headers().contains_key("access-control-allow-origin"), "{path}");
    }
}

#[tokio::test]
async fn the_overview_shows_all_waiting_rows_and_letters_and_the_last_hour_of_this_daemon() {
    let (world, daemon, addr, [row, letter], _inbox) = start_with_parked_and_dead().await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', key => 'later', subject => 'it')").await;
    world.sql("SELECT tidings.schedule('nobody', now())").await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE held)").await;
    let (status, answer) =
        post_action(&addr, "/api/kinds/message/pause", json!({ "reason": "why not", "for_seconds": 3600 })).await;
    let says = answer["says"].as_str().expect("a sentence");
    assert!(
        status == 200 && says.contains("the kind message is paused by postgres") && says.contains("why not"),
        "{answer}"
    );

    let (status, answer) = get_json(&addr, "/api/overview").await;

    assert_eq!(status, 200, "{answer}");
    let database = &answer["database"];
    assert_eq!((&answer["ready"], &database["late_seconds"]), (&true.into(), &0.0.into()), "{answer}");
    assert_eq!(
        (&database["next"][0]["key"], &database["next"][0]["subject"]),
        (&"later".into(), &"it".into()),
        "{answer}"
    );
    assert_eq!(database["held"], json!([{ "kind": "nobody", "rows": 1, "or_more": false }]), "{answer}");
    assert_eq!(database["paused"][0]["reason"], "why not", "{answer}");
    assert_eq!(
        (&database["parked"]["rows"], &database["parked"]["newest"][0]["id"]),
        (&1.into(), &row.as_str().into()),
        "{answer}"
    );
    assert_eq!(answer["letters"], json!({ "dead": 1, "parked": 0 }), "{answer}");
    assert_eq!(answer["plugins"][0]["active"]["kinds"][0]["kind"], "message", "{answer}");
    let minutes = answer["hour"]["minutes"].as_array().expect("minutes");
    let sum = |field: &str| minutes.iter().map(|minute| minute[field].as_u64().expect("a number")).sum::<u64>();
    assert_eq!((minutes.len(), sum("delivered"), sum("parked"), sum("held")), (61, 1, 1, 1), "{answer}");
    let p99 = minutes.iter().find_map(|minute| minute["p99"].as_f64()).expect("one was delivered");
    assert!((0.0..30.0).contains(&p99), "{answer}");
    assert!(!answer.to_string().contains("routing key"), "no payload is shown: {answer}");

    let (status, answer) = get_json(&addr, &format!("/api/rows?which={row}")).await;
    let explanation = answer["explanation"].as_str().expect("a sentence");
    assert!(status == 200 && explanation.starts_with("parked at") && answer["state"] == "parked", "{answer}");
    let (_, answer) = get_json(&addr, "/api/rows?which=message%2Flater").await;
    assert_eq!(answer["state"], "waiting", "{answer}");

    // Listing dead letters fetches them from the queue and returns them to it.
    for _ in 0..2 {
        let (status, answer) = get_json(&addr, "/api/letters").await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!((&answer["dead"]["waiting"], &answer["parked"]["waiting"]), (&1.into(), &0.into()), "{answer}");
        let shown = &answer["dead"]["letters"][0];
        assert_eq!(
            (&shown["id"], &shown["queue"], &shown["reason"]),
            (&letter.as_str().into(), &"inbox.k".into(), &"rejected".into()),
            "{answer}"
        );
        wait_for_message_count(&world, "tidings.dead", 1).await;
    }
    let (status, answer) = post_action(&addr, "/api/kinds/message/resume", json!({})).await;
    assert_eq!((status, &answer["says"]), (200, &"the kind message goes on".into()), "{answer}");
    drop(daemon);
}

#[tokio::test]
async fn rows_and_letters_are_retried_or_dropped_singly_or_all_and_failures_stay_with_the_reason() {
    let (world, mut daemon, addr, [row, letter], mut inbox) = start_with_parked_and_dead().await;
    world
        .sql(&format!(r#"UPDATE tidings.parked SET payload = '{{"routing_key": "k", "body": 1}}' WHERE id = '{row}'"#))
        .await;

    let (status, answer) = post_action(&addr, &format!("/api/parked/{row}/retry"), json!({})).await;
    assert_eq!((status, &answer["says"]), (200, &"1 row put back into the queue".into()), "{answer}");
    assert_eq!(inbox.next().await.id().to_string(), row);
    let (status, answer) = post_action(&addr, "/api/dead/replay", json!({ "ids": [letter, "nobody"] })).await;
    assert_eq!((status, &answer["says"]), (200, &"dead letters: 1 replayed, 0 expired, 0 parked".into()), "{answer}");
    assert_eq!(inbox.next().await.id().to_string(), letter);
    assert_eq!(count_messages(&world, "tidings.dead").await, 0);

    world.sql(r#"SELECT tidings.schedule('message', now(), '{"bad": 1}', key => 'key ' || n) FROM generate_series(1, 3) AS n"#).await;
    world.wait_until("SELECT count(*) = 3 FROM tidings.parked").await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 day', key => 'key 2')").await;
    let taken: uuid::Uuid = world.value("SELECT id FROM tidings.parked WHERE key = 'key 2'").await;
    let (status, answer) = post_action(&addr, &format!("/api/parked/{taken}/retry"), json!({})).await;
    assert!(status == 409 && answer["error"].as_str().is_some_and(|error| error.contains("key")), "{status} {answer}");
    let (status, answer) = post_action(&addr, "/api/parked/retry", json!({ "all": true })).await;
    assert_eq!((status, &answer["says"]), (200, &"2 rows put back into the queue, and 1 cannot be".into()), "{answer}");
    assert_eq!(answer["stay"][0]["id"], taken.to_string(), "{answer}");
    // All three rows are parked again.
    world.wait_until("SELECT count(*) = 3 FROM tidings.parked").await;
    let (_, answer) = post_action(&addr, "/api/parked/drop", json!({ "all": true })).await;
    assert_eq!(answer["says"], "3 rows dropped for good", "{answer}");
    let (status, answer) = post_action(&addr, "/api/parked/drop", json!({ "all": true })).await;
    assert_eq!((status, &answer["says"]), (200, &"0 rows dropped for good".into()), "{answer}");

    // While another session works on the dead letters, requests about them are refused.
    let mut session = world.db.acquire().await.expect("a connection");
    let lock = "SELECT pg_advisory_lock(hashtextextended('tidings.dead tidings', 0))";
    sqlx::query(lock).execute(&mut *session).await.expect("locked");
    for (status, answer) in
        [post_action(&addr, "/api/dead/drop", json!({ "all": true })).await, get_json(&addr, "/api/letters").await]
    {
        let sentence = answer["error"].as_str().expect("a sentence");
        assert!(status == 409 && sentence.contains("somebody is making a pass"), "{status} {sentence}");
    }
    assert!(!daemon.has_ended());
}
