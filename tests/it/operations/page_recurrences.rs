//! Recurrences in the API and on the page: they are listed with their rules in words and their problems, and can be paused,
//! resumed and stopped.

use fantoccini::key::Key;
use harness::daemon::Daemon;
use harness::world::World;
use serde_json::{Value, json};
use ureq::http::Request;

use crate::operations::page::{HOSTILE, check_no_foreign_requests, enter_token, start_page};
use crate::operations::page_api::{TOKEN, action_request, get_json, post_action, send_request};

/// Makes a recurrence whose first occurrence is due in 30 days at the earliest.
async fn repeat_nightly(world: &World) {
    world
        .sql("SELECT tidings.repeat('nightly', 'message', '30 2 * * *', time_zone => 'Europe/Berlin', starts_at => now() + interval '30 days')")
        .await;
    world.wait_until("SELECT next_at IS NOT NULL FROM tidings.recurrences WHERE name = 'nightly'").await;
}

/// Starts a daemon in a new world with four recurrences: one comes at night, one three times, one is paused, and one never
/// comes. Returns its address, too.
async fn start_with_recurrences() -> (World, Daemon, String) {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.launch().with("TIDINGS_HTTP_TOKEN", TOKEN).start_ready().await;
    let addr = daemon.http_addr().await;
    repeat_nightly(&world).await;
    for call in [
        "repeat('reports/every hour', 'message', 'every 1 hour', starts_at => now() + interval '30 minutes', max_count => 3, subject => 'shop')",
        "repeat('a paused one', 'message', 'every 2 hours')",
        "pause_recurrence('a paused one', true)",
        "repeat('leap', 'message', '0 0 30 2 *')",
    ] {
        world.sql(&format!("SELECT tidings.{call}")).await;
    }
    world.wait_until("SELECT problem IS NOT NULL FROM tidings.recurrences WHERE name = 'leap'").await;
    (world, daemon, addr)
}

fn list(overview: &Value) -> &[Value] {
    overview["database"]["recurrences"]["list"].as_array().unwrap_or_else(|| panic!("no recurrences: {overview}"))
}

fn names(overview: &Value) -> Vec<&str> {
    list(overview).iter().map(|recurrence| recurrence["name"].as_str().expect("a name")).collect()
}

#[tokio::test]
async fn the_overview_lists_recurrences_with_their_rules_in_words_and_their_problems() {
    let (_world, _daemon, addr) = start_with_recurrences().await;

    let (status, overview) = get_json(&addr, "/api/overview").await;

    assert_eq!(status, 200, "{overview}");
    let recurrences = &overview["database"]["recurrences"];
    assert_eq!(
        (&recurrences["all"], &recurrences["or_more"], &recurrences["problems"]),
        (&4.into(), &false.into(), &1.into()),
        "{overview}"
    );
    // First the one with the problem, then those that go on, in the order of time, then the others.
    assert_eq!(names(&overview), ["leap", "reports/every hour", "nightly", "a paused one"], "{overview}");
    let [leap, hourly, nightly, paused] = list(&overview) else { panic!("{overview}") };
    assert!(leap["problem"].as_str().is_some_and(|problem| problem.contains("never comes")), "{leap}");
    assert_eq!((&leap["next_at"], &leap["due_at"]), (&Value::Null, &Value::Null), "{leap}");
    assert_eq!((&hourly["max_count"], &hourly["count"], &hourly["subject"]), (&3.into(), &0.into(), &"shop".into()));
    assert_eq!(
        (&nightly["words"], &nightly["rule"], &nightly["time_zone"], &nightly["kind"]),
        (&"At 02:30".into(), &"30 2 * * *".into(), &"Europe/Berlin".into(), &"message".into()),
        "{nightly}"
    );
    assert!(nightly["due_at"].is_string() && nightly["due_at"] == nightly["next_at"], "{nightly}");
    assert_eq!((&nightly["problem"], &nightly["paused"]), (&Value::Null, &false.into()), "{nightly}");
    assert_eq!((&paused["paused"], &paused["problem"]), (&true.into(), &Value::Null), "{paused}");
}

#[tokio::test]
async fn coming_occurrences_are_shown_among_the_rows_in_the_order_of_time() {
    let (world, _daemon, addr) = start_with_recurrences().await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', key => 'a row')").await;

    let (_, overview) = get_json(&addr, "/api/overview").await;

    let next = overview["database"]["next"].as_array().expect("rows");
    let shown: Vec<Value> =
        next.iter().map(|row| json!([row["recurrence"], row["key"], row["id"].is_string()])).collect();
    let hourly = json!(["reports/every hour", null, false]);
    let mut expected = vec![hourly.clone(), json!([null, "a row", true]), hourly.clone(), hourly];
    expected.resize(10, json!(["nightly", null, false]));
    assert_eq!(shown, expected, "{overview}");
    assert_eq!((&next[0]["kind"], &next[0]["subject"]), (&"message".into(), &"shop".into()), "{overview}");
    assert!(next.iter().all(|row| row["at"] == row["due_at"]), "{overview}");
}

#[tokio::test]
async fn an_occurrence_that_is_made_is_shown_as_a_row_and_not_twice() {
    let (world, _daemon, addr) = start_with_recurrences().await;
    world
        .sql("SELECT tidings.repeat('soon', 'message', 'every 1 day', starts_at => now() + interval '25 seconds', max_count => 1)")
        .await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE recurrence = 'soon')").await;

    let (_, overview) = get_json(&addr, "/api/overview").await;

    let next = overview["database"]["next"].as_array().expect("rows");
    assert!(next[0]["key"].as_str().is_some_and(|key| key.starts_with("soon/")), "{overview}");
    assert!(next[0]["id"].is_string() && next[0]["recurrence"].is_null(), "{overview}");
    assert!(next.iter().all(|row| row["recurrence"] != "soon"), "{overview}");
    let soon = list(&overview).iter().find(|recurrence| recurrence["name"] == "soon").expect("listed");
    assert_eq!(soon["count"], 1, "{soon}");
}

#[tokio::test]
async fn more_than_fifty_recurrences_are_shown_in_part_those_with_problems_first() {
    let (world, _daemon, addr) = start_with_recurrences().await;
    world
        .sql("SELECT tidings.repeat('one of many ' || n, 'message', 'every 1 day', starts_at => now() + n * interval '1 hour') FROM generate_series(2, 70) AS n")
        .await;

    let (_, overview) = get_json(&addr, "/api/overview").await;

    assert_eq!(overview["database"]["recurrences"]["all"], 73, "{overview}");
    let names = names(&overview);
    assert_eq!((names.len(), &names[..4]), (50, &["leap", "reports/every hour", "one of many 2", "one of many 3"][..]));
    assert!(!names.contains(&"nightly") && !names.contains(&"a paused one"), "{names:?}");
    let next = overview["database"]["next"].as_array().expect("rows");
    assert_eq!((next.len(), &next[9]["recurrence"]), (10, &"one of many 8".into()), "{overview}");
}

#[tokio::test]
async fn a_recurrence_is_paused_resumed_and_stopped_through_the_api() {
    let (world, mut daemon, addr) = start_with_recurrences().await;
    let act = async |action: &str| {
        let path = format!("/api/recurrences/reports%2Fevery%20hour/{action}");
        let (status, answer) = post_action(&addr, &path, json!({})).await;
        let sentence = answer["says"].as_str().or(answer["error"].as_str()).expect("a sentence").to_owned();
        (status, sentence)
    };
    let is_paused = "SELECT paused FROM tidings.recurrences WHERE name = 'reports/every hour'";
    for (action, expected, paused) in [
        (
            "pause",
            "the recurrence \"reports/every hour\" is paused: it makes no occurrences until somebody resumes it",
            true,
        ),
        ("pause", "the recurrence \"reports/every hour\" was paused already", true),
        ("resume", "the recurrence \"reports/every hour\" goes on", false),
        ("resume", "the recurrence \"reports/every hour\" was not paused", false),
    ] {
        assert_eq!(act(action).await, (200, expected.to_owned()), "{action}");
        assert_eq!(world.value::<bool>(is_paused).await, paused, "{action}");
    }

    let (status, says) = act("stop").await;

    assert!(status == 200 && says.starts_with("the recurrence \"reports/every hour\" is stopped"), "{status} {says}");
    daemon.wait_for_line("is stopped; its occurrences that waited are removed").await;
    let (_, overview) = get_json(&addr, "/api/overview").await;
    assert_eq!(names(&overview), ["leap", "nightly", "a paused one"], "{overview}");
    for action in ["pause", "resume", "stop"] {
        let (status, error) = act(action).await;
        assert_eq!((status, &*error), (404, "there is no recurrence named \"reports/every hour\""), "{action}");
    }
}

#[tokio::test]
async fn requests_about_recurrences_are_refused_without_a_token_and_if_they_are_invalid() {
    let (world, _daemon, addr) = start_with_recurrences().await;
    for action in ["pause", "resume", "stop"] {
        let path = format!("/api/recurrences/nightly/{action}");
        for (given, part) in
            [(None, "a token is needed"), (Some("Bearer wrong-token-of-somebody"), "the token is wrong")]
        {
            let mut request = action_request(&addr, &path, "{}");
            request.headers_mut().remove("Authorization");
            if let Some(given) = given {
                request.headers_mut().insert("Authorization", given.parse().expect("a header"));
            }
            let (status, answer) = send_request(request).await;
            let sentence = answer["error"].as_str().expect("a sentence");
            assert!(status == 401 && sentence.contains(part), "{given:?} {path}: {status} {sentence}");
        }
        for (name, body, status, part) in [
            ("nobody", "{}", 404, "there is no recurrence named \"nobody\""),
            ("", "", 404, "there is no recurrence named \"\""),
            ("%ff", "", 400, "not UTF-8"),
            ("%00", "", 400, "0x00"),
            ("nightly", r#"{"all": true}"#, 400, "unknown field"),
            ("nightly", "[]x", 400, "not the JSON"),
            ("night/ly", "{}", 404, "there is nothing at"),
        ] {
            let request = action_request(&addr, &format!("/api/recurrences/{name}/{action}"), body);
            let (answered, answer) = send_request(request).await;
            let sentence = answer["error"].as_str().unwrap_or_else(|| panic!("{name} {action}: {answer}"));
            assert!(answered == status && sentence.contains(part), "{name} {action}: {answered} {sentence}");
        }
        let (status, answer) = get_json(&addr, &path).await;
        assert!(status == 405 && answer["error"].as_str().is_some_and(|error| error.contains("act with POST")));
    }
    let mut foreign = action_request(&addr, "/api/recurrences/nightly/stop", "{}");
    foreign.headers_mut().insert("Origin", "http://evil.example".parse().expect("a header"));
    assert_eq!(send_request(foreign).await.0, 403);
    let other = Request::delete(format!("http://{addr}/api/recurrences/nightly/stop")).body(()).expect("a request");
    assert_eq!(send_request(other).await.0, 405);
    let unchanged = "SELECT count(*) = 4 AND count(*) FILTER (WHERE paused) = 1 FROM tidings.recurrences";
    assert!(world.value::<bool>(unchanged).await, "nothing was done");
}

#[tokio::test]
async fn the_page_shows_recurrences_and_its_buttons_pause_resume_and_stop_them() {
    let (world, _daemon, browser, _) = start_page(&["message"]).await;
    browser.wait_until("document.querySelector('#recurrences-section').hidden").await;
    repeat_nightly(&world).await;
    sqlx::query("SELECT tidings.repeat($1, 'message', '0 0 30 2 *', subject => $1)")
        .bind(HOSTILE)
        .execute(&world.db)
        .await
        .expect("made");
    browser.wait_until_text("#recurrences-caption", "2 in all, 1 with a problem").await;
    for part in [HOSTILE, "never comes", "nightly", "At 02:30", "30 2 * * *, Europe/Berlin", "in 3"] {
        browser.wait_until_text("#recurrences", part).await;
    }
    for part in ["nightly/…", "not made yet"] {
        browser.wait_until_text("#next", part).await;
    }
    browser.wait_until_text("#next-under", "message · nightly").await;
    browser.run_script("document.querySelector('#recurrences-title').scrollIntoView()").await;

    browser.click("button[aria-label='Pause the recurrence nightly']").await;
    enter_token(&browser, TOKEN).await;
    browser.wait_until_text("#notice", "The recurrence \"nightly\" is paused").await;
    browser.wait_until_text("button[aria-label='Resume the recurrence nightly']", "Resume").await;
    browser.wait_until_text("#recurrences tbody tr:nth-child(2)", "paused").await;
    browser.wait_until_text("#next-figure", "nothing").await;
    browser.click("button[aria-label='Resume the recurrence nightly']").await;
    browser.wait_until_text("button[aria-label='Pause the recurrence nightly']", "Pause").await;
    browser.wait_until_text("#next", "nightly/…").await;

    // The first is the one with the problem.
    let stop = "#recurrences tbody tr:first-child button.drop";
    browser.click(stop).await;
    browser.wait_until_text("#drop-dialog", "Stop 1 recurrence for good?").await;
    browser.wait_until_text("#drop-text", HOSTILE).await;
    browser.press(Key::Escape).await;
    browser.wait_until("!document.querySelector('#drop-dialog[open]')").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.recurrences").await, 2);
    for left in [1, 0] {
        browser.click(stop).await;
        browser.wait_until_text("#drop-dialog button.danger", "Stop for good").await;
        browser.click("#drop-dialog button.danger").await;
        browser.wait_until(&format!("document.querySelectorAll('#recurrences tbody tr').length === {left}")).await;
        browser.wait_until("!document.body.dataset.busy").await;
        browser.wait_until_text("#notice", "is stopped").await;
    }
    // The section is gone, and the focus is at the title before it.
    browser.wait_until("document.querySelector('#recurrences-section').hidden").await;
    browser.wait_until("document.activeElement.id === 'kinds-title'").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.recurrences").await, 0);
    assert_eq!(browser.run_script("return typeof hacked").await, "undefined");
    check_no_foreign_requests(&browser).await;
}
