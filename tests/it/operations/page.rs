//! The page in a real browser: it updates without a reload, can be used with the keyboard alone, and shows all foreign
//! text as plain text.

use fantoccini::key::Key;
use harness::browser::Browser;
use harness::daemon::Daemon;
use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::dead_letters::replay::{
    count_messages, launch_with_hourly_passes, publish_message, reject_next, schedule_message, suppress_pass_at_start,
    wait_for_message_count,
};
use crate::operations::page_api::{TOKEN, get_json, post_action};

/// Starts a daemon in a new world and opens its page in a browser. Returns the address of the daemon last.
pub(crate) async fn start_page(plugins: &[&str]) -> (World, Daemon, Browser, String) {
    let world = World::with_plugins(plugins).await;
    suppress_pass_at_start(&world).await;
    let mut daemon = launch_with_hourly_passes(&world).with("TIDINGS_HTTP_TOKEN", TOKEN).start_ready().await;
    let addr = daemon.http_addr().await;
    let browser = open_browser_at(&addr).await;
    (world, daemon, browser, addr)
}

/// Opens the page of the daemon at this address in a new browser.
pub(crate) async fn open_browser_at(addr: &str) -> Browser {
    let browser = Browser::start().await;
    browser.open(&format!("http://{addr}/")).await;
    browser.wait_until("document.body.dataset.loaded").await;
    browser
}

/// Waits for the dialog that asks for the token, and enters it.
pub(crate) async fn enter_token(browser: &Browser, token: &str) {
    browser.wait_until("document.querySelector('#token-dialog[open]')").await;
    browser.type_text(token).await;
    browser.press(Key::Enter).await;
}

/// Checks that the page has contacted no other host, and that the browser's console has no messages.
pub(crate) async fn check_no_foreign_requests(browser: &Browser) {
    let elsewhere = browser
        .run_script("return performance.getEntriesByType('resource').map(({ name }) => name).filter((name) => !name.startsWith(location.origin))")
        .await;
    assert_eq!(elsewhere, json!([]));
    assert_eq!(browser.take_console_messages().await, Vec::<String>::new());
}

#[tokio::test]
async fn the_page_shows_changes_without_a_reload() {
    let (world, daemon, browser, addr) = start_page(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    browser.run_script("window.mark = 1").await;
    browser.wait_until_text("#state", "ready").await;
    browser.wait_until_text("#next-empty", "SELECT tidings.schedule('message'").await;
    browser.wait_until_text("#dead-empty", "x-dead-letter-exchange = tidings.dlx").await;

    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', '{\"routing_key\": \"k\", \"body\": 1}', key => 'game 7')").await;
    browser.wait_until_text("#next", "game 7").await;
    browser.wait_until_text("#next", "in 59 min").await;
    browser.wait_until_text("#next-under", "message · game 7").await;
    world.sql("SELECT tidings.reschedule('message', 'game 7', now())").await;
    inbox.next().await;
    browser.wait_until_text("#hour-figure", "1").await;
    browser.wait_until_text("#next-figure", "nothing").await;
    browser.wait_until_text("#throughput .readout", "1 delivered").await;
    world.install("game-status");
    browser.wait_until_text("#kinds", "game-status").await;

    // The page explains where a row is.
    browser.click("#which").await;
    browser.type_text("message/game 7").await;
    browser.press(Key::Enter).await;
    browser.wait_until_text("#explained", "Delivered at").await;

    check_no_foreign_requests(&browser).await;
    drop(daemon);
    browser.wait_until_text("#state", "the daemon has not answered since").await;
    browser.wait_until("document.title.startsWith('No answer')").await;
    let mut again = world.launch().with("TIDINGS_HTTP_ADDR", &addr).start_ready().await;
    browser.wait_until_text("#state", "ready").await;
    browser.wait_until_text("#read-only", "TIDINGS_HTTP_TOKEN").await;
    assert_eq!(browser.run_script("return window.mark").await, 1, "it was not loaded again");
    assert!(!again.has_ended());
}

#[tokio::test]
async fn a_parked_row_can_be_retried_with_the_keyboard_alone() {
    let (world, _daemon, browser, _) = start_page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let (first, second) =
        (schedule_message(&world, r#"{"no": 1}"#).await, schedule_message(&world, r#"{"no": 2}"#).await);
    browser.wait_until_text("#parked-caption", "2 in all").await;
    world.sql(r#"UPDATE tidings.parked SET payload = '{"routing_key": "k", "body": 1}'"#).await;

    browser.tab_to(&format!("button[aria-label^='Retry the row {second}']")).await;
    browser.press(Key::Enter).await;
    enter_token(&browser, TOKEN).await;

    assert_eq!(inbox.next().await.id(), second);
    browser.wait_until_text("#notice", "1 row put back into the queue").await;
    browser.wait_until_text("#parked-caption", "1 in all").await;
    // The button of the next row has the focus.
    browser
        .wait_until(&format!("document.activeElement.getAttribute('aria-label')?.startsWith('Retry the row {first}')"))
        .await;
    browser.press(Key::Enter).await;
    assert_eq!(inbox.next().await.id(), first);
    browser.wait_until_text("#parked-empty", "None.").await;
    // The plots can be read with the keyboard too.
    browser.tab_to("#throughput svg").await;
    browser.press(Key::Left).await;
    browser.wait_until_text("#throughput .readout", "1 min ago").await;
    browser.wait_until("document.activeElement.getAttribute('aria-valuetext').includes('min ago')").await;
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn a_dead_letter_is_replayed_at_once_and_dropped_only_after_confirmation() {
    let (world, _daemon, browser, _) = start_page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let replayed = schedule_message(&world, r#"{"routing_key": "k", "body": "one"}"#).await;
    reject_next(&mut inbox).await;
    let dropped = schedule_message(&world, r#"{"routing_key": "k", "body": "other"}"#).await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 2).await;
    browser.run_script("document.querySelector('#dead-title').scrollIntoView()").await;
    browser.wait_until_text("#dead-caption", "2 in all").await;
    browser.wait_until_text("#dead", "rejected").await;

    browser.click(&format!("button[aria-label='Replay the dead letter {replayed}']")).await;
    enter_token(&browser, TOKEN).await;
    assert_eq!(inbox.next().await.id(), replayed);
    browser.wait_until_text("#notice", "1 replayed").await;
    browser.wait_until_text("#dead-caption", "1 in all").await;

    let drop = format!("button[aria-label='Drop the dead letter {dropped}']");
    browser.click(&drop).await;
    browser.wait_until_text("#drop-dialog", "Drop 1 dead letter for good?").await;
    browser.press(Key::Escape).await;
    browser.wait_until("!document.querySelector('#drop-dialog[open]')").await;
    assert_eq!(count_messages(&world, "tidings.dead").await, 1);
    browser.click(&drop).await;
    browser.click("#drop-dialog button.danger").await;
    browser.wait_until_text("#notice", "1 dropped for good").await;
    browser.wait_until("document.querySelector('#dead-empty').checkVisibility()").await;
    wait_for_message_count(&world, "tidings.dead", 0).await;
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn a_kind_can_be_paused_with_a_reason_and_resumed() {
    let (world, _daemon, browser, _) = start_page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    browser.click("button[aria-label='Pause the kind message']").await;
    enter_token(&browser, TOKEN).await;
    browser.wait_until("document.querySelector('#pause-dialog[open]')").await;
    browser.tab_to("#pause-reason").await;
    browser.type_text("the mail server is down").await;
    browser.press(Key::Enter).await;
    browser.wait_until_text("#kinds", "paused by postgres").await;
    browser.wait_until_text("#kinds", "until somebody resumes it: the mail server is down").await;
    let row = schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    browser.wait_until_text("#waiting-under", "1 held").await;

    browser.click("button[aria-label='Resume the kind message']").await;

    assert_eq!(inbox.next().await.id(), row);
    browser.wait_until_text("button[aria-label='Pause the kind message']", "Pause").await;
    browser.wait_until_text("#waiting-under", "none held").await;
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn the_page_reports_a_wrong_token_and_keeps_the_right_one_for_the_tab() {
    let (world, _daemon, browser, addr) = start_page(&["message"]).await;
    schedule_message(&world, r#"{"no": 1}"#).await;
    browser.wait_until_text("#parked-caption", "1 in all").await;
    browser.click("#parked-all button.drop").await;
    browser.click("#drop-dialog button.danger").await;
    enter_token(&browser, "no-token-of-the-tests").await;
    browser.wait_until_text("#token-wrong", "The token is wrong").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.parked").await, 1);
    enter_token(&browser, TOKEN).await;
    browser.wait_until_text("#notice", "1 row dropped for good").await;

    browser.open(&format!("http://{addr}/")).await;
    browser.wait_until_text("#unlock", "Forget the token").await;
    browser.click("#unlock").await;
    browser.wait_until_text("#unlock", "Give the token").await;
    assert_eq!(browser.run_script("return sessionStorage.length").await, 0);
    // The console reports only the refused request with the wrong token.
    let complaints = browser.take_console_messages().await;
    assert!(complaints.iter().all(|line| line.contains("401")), "{complaints:?}");
}

#[tokio::test]
async fn without_a_token_the_page_is_read_only() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    schedule_message(&world, r#"{"no": 1}"#).await;
    let browser = open_browser_at(&daemon.http_addr().await).await;
    browser.wait_until_text("#parked", "message").await;
    browser.wait_until_text("#read-only", "Read-only").await;
    let buttons = browser.run_script("return [...document.querySelectorAll('button[data-acts]')].filter((button) => button.checkVisibility()).length").await;
    assert_eq!(buttons, 0);
    check_no_foreign_requests(&browser).await;
}

/// Text with which an attacker tries to inject HTML.
pub(crate) const HOSTILE: &str = r#"<img src=x onerror="hacked=1"><script>hacked=1</script>&lt;"#;

#[tokio::test]
async fn foreign_text_is_shown_as_plain_text_and_never_executed() {
    let (world, _daemon, browser, addr) = start_page(&["message"]).await;
    let long = "k".repeat(255);
    let odd = "a\u{1b}[31mb\u{202e}c\u{7f}d\ne";
    for (key, subject) in [(HOSTILE, odd), (&*long, "x"), (odd, HOSTILE)] {
        sqlx::query("SELECT tidings.schedule('message', now() + interval '1 day', key => $1, subject => $2)")
            .bind(key)
            .bind(subject)
            .execute(&world.db)
            .await
            .expect("scheduled");
    }
    sqlx::query("INSERT INTO tidings.parked (id, kind, key, due_at, payload, headers, attempts, created_at, reason, plugin) SELECT tidings.uuid_v7(), $1, $2, now(), '{}', '{}', 0, now(), $3, $1")
        .bind(HOSTILE)
        .bind(odd)
        .bind(format!("{HOSTILE}{}", "y".repeat(2_000)))
        .execute(&world.db)
        .await
        .expect("parked");
    let (status, answer) =
        post_action(&addr, "/api/kinds/message/pause", json!({ "reason": format!("{HOSTILE}{odd}") })).await;
    assert_eq!(status, 200, "{answer}");
    let mut death = FieldTable::default();
    for (name, value) in [("queue", HOSTILE), ("reason", odd)] {
        death.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let mut headers = FieldTable::default();
    headers.insert("x-death".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into()));
    headers.insert("tidings-kind".into(), AMQPValue::LongString(HOSTILE.into()));
    headers.insert("tidings-parked-reason".into(), AMQPValue::LongString(HOSTILE.into()));
    let properties = BasicProperties::default().with_headers(headers).with_message_id(HOSTILE.into());
    publish_message(&world, "", "tidings.dead", b"secret", properties.clone()).await;
    publish_message(&world, "", "tidings.parking", b"secret", properties).await;
    world.put(&"<img src=x onerror=hacked=1>.wasm".replace('/', ""), b"no plugin");

    browser.open(&format!("http://{addr}/")).await;
    browser.wait_until_text("#letters-caption", "1 in all").await;
    browser.wait_until_text("#problems", "<img src=x onerror=hacked=1>.wasm does not serve").await;
    let shown = "a‹U+001B›[31mb‹U+202E›c‹U+007F›d↵ e";
    for (place, parts) in [
        ("#next", [HOSTILE, shown, &*long]),
        ("#parked", [HOSTILE, shown, "by <img"]),
        ("#kinds", [HOSTILE, shown, "paused by"]),
        ("#dead", [HOSTILE, shown, HOSTILE]),
        ("#letters", [HOSTILE, HOSTILE, HOSTILE]),
    ] {
        for part in parts {
            browser.wait_until_text(place, part).await;
        }
    }
    // The dialog and the explanation show the text too.
    browser.click("#dead button.drop").await;
    browser.wait_until_text("#drop-text", HOSTILE).await;
    browser.press(Key::Escape).await;
    browser.click("#dead button.bare").await;
    browser.wait_until_text("#explained", "Nothing is known of the kind <img").await;
    browser.click("#next tbody tr:first-child button.bare").await;
    browser.wait_until_text("#explained .facts", HOSTILE).await;

    let hacked = browser
        .run_script("return [typeof hacked, document.querySelectorAll('main img, main script, dialog img').length]")
        .await;
    assert_eq!(hacked, json!(["undefined", 0]));
    let overflow = browser.run_script("return document.documentElement.scrollWidth - innerWidth").await;
    assert_eq!(overflow, 0);
    let (_, overview) = get_json(&addr, "/api/overview").await;
    let (_, letters) = get_json(&addr, "/api/letters").await;
    assert!(!format!("{overview}{letters}").contains("secret"), "no body is shown");
    let complaints = browser.take_console_messages().await;
    assert!(complaints.iter().all(|line| line.contains("/api/rows")), "{complaints:?}");
}

#[tokio::test]
async fn the_page_fits_a_phone_and_a_desktop_in_light_and_dark_themes() {
    let (world, _daemon, browser, addr) = start_page(&["message", "game-status", "game-reminder"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "k", "body": 1}', key => 'now ' || n) FROM generate_series(1, 500) AS n"#).await;
    for _ in 0..2 {
        reject_next(&mut inbox).await;
    }
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": 1}', key => 'offer ' || n, subject => 'shop') FROM generate_series(1, 3) AS n"#).await;
    world.sql(r#"SELECT tidings.schedule('message', now() + (n + 2) * (n + 2) * interval '47 seconds', '{"routing_key": "k", "body": 1}', key => 'feedback ' || n, subject => 'order ' || n) FROM generate_series(1, 40) AS n"#).await;
    world.sql("SELECT tidings.schedule('auction', now(), key => 'lot ' || n) FROM generate_series(1, 12) AS n").await;
    world.sql("SELECT tidings.repeat('nightly report', 'message', '30 2 * * *', time_zone => 'Europe/Berlin', starts_at => now() + interval '30 days')").await;
    world.sql("SELECT tidings.repeat('leap day', 'message', '0 0 30 2 *', subject => 'shop')").await;
    let foreign = BasicProperties::default().with_message_id("lost".into());
    publish_message(&world, "", "tidings.parking", b"", foreign).await;
    let (status, _) = post_action(
        &addr,
        "/api/kinds/game-status/pause",
        json!({ "reason": "the mail server is down", "for_seconds": 3600 }),
    )
    .await;
    assert_eq!(status, 200);
    world.put("offers.wasm", b"no plugin");
    browser.open(&format!("http://{addr}/")).await;
    browser.wait_until_text("#parked-caption", "3 in all").await;
    browser.wait_until_text("#dead-caption", "2 in all").await;
    browser.wait_until_text("#letters-caption", "1 in all").await;
    browser.wait_until_text("#waiting-under", "12 held").await;
    browser.wait_until_text("#problems", "offers.wasm does not serve").await;
    browser.wait_until_text("#hour-figure", "500").await;
    browser.wait_until_text("#kinds", "the mail server is down").await;
    browser.wait_until_text("#recurrences-caption", "2 in all, 1 with a problem").await;

    for (width, dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
        browser.set_view(width, dark).await;
        browser.wait_until(&format!("innerWidth === {width}")).await;
        browser.wait_until(&format!("matchMedia('(prefers-color-scheme: dark)').matches === {dark}")).await;
        let wide = browser.run_script("return [...document.querySelectorAll('main *')].filter((element) => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('thead')).map((element) => element.outerHTML.slice(0, 200))").await;
        assert_eq!(wide, json!([]), "{width}");
        assert_eq!(
            browser.run_script("return document.documentElement.scrollWidth").await,
            width,
            "it scrolls sideways"
        );
        let theme = if dark { "dark" } else { "light" };
        browser.write_screenshot(&harness::target().join(format!("screenshots/page-{width}-{theme}.png"))).await;
        let pale = browser.run_script(CONTRAST).await;
        assert_eq!(pale, json!([]), "{width} {theme}: contrasts below 4.5 to 1");
    }
    // With text twice as large, which some users need.
    browser.set_view(640, false).await;
    browser.run_script("document.documentElement.style.fontSize = '200%'").await;
    browser.wait_until("document.documentElement.scrollWidth === innerWidth").await;
    check_no_foreign_requests(&browser).await;
    let unnamed = browser.run_script("return [...document.querySelectorAll('button, input, select, a, [tabindex=\"0\"]')].filter((element) => !(element.ariaLabel || element.getAttribute('aria-labelledby') || element.labels?.length || element.textContent)).map((element) => element.outerHTML)").await;
    assert_eq!(unnamed, Value::Array(Vec::new()));
}

/// The script that lists each text whose contrast with its background is below 4.5 to 1.
const CONTRAST: &str = r"
    const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number); return { r, g, b, a }; };
    const light = ({ r, g, b }) => [r, g, b].map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const behind = (element) => { for (let at = element; at; at = at.parentElement) { const color = parse(getComputedStyle(at).backgroundColor); if (color.a === 1) return color; } return { r: 255, g: 255, b: 255 }; };
    const pale = [];
    for (const element of document.querySelectorAll('body *')) {
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!text || !element.checkVisibility() || element.closest('svg, [aria-disabled=true]')) continue;
        const [one, other] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (contrast < 4.5) pale.push(`${contrast.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
    }
    return pale;";
