//! The page, in a real browser: what is seen without a reload, what can be done with the keyboard alone, and that nothing
//! that anybody has written does anything but show.

use fantoccini::key::Key;
use harness::browser::Browser;
use harness::daemon::Daemon;
use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::dead_letters::replay::{no_pass_at_start, once, publish, reject, send, until_waiting, waiting};
use crate::operations::page_api::{TOKEN, act, get};

/// A world with a daemon, and its page in a browser.
async fn page(plugins: &[&str]) -> (World, Daemon, Browser, String) {
    let world = World::with(plugins).await;
    no_pass_at_start(&world).await;
    let mut daemon = once(&world).with("TIDINGS_HTTP_TOKEN", TOKEN).ready().await;
    let addr = daemon.http_addr().await;
    let browser = opened(&addr).await;
    (world, daemon, browser, addr)
}

/// The page of the daemon at this address.
async fn opened(addr: &str) -> Browser {
    let browser = Browser::start().await;
    browser.open(&format!("http://{addr}/")).await;
    browser.until("document.body.dataset.loaded").await;
    browser
}

/// Gives the token to the dialog that asks for it.
async fn give(browser: &Browser, token: &str) {
    browser.until("document.querySelector('#token-dialog[open]')").await;
    browser.type_in(token).await;
    browser.press(Key::Enter).await;
}

/// Nothing was loaded from or sent to anybody else, and the browser has nothing to complain of.
async fn only_our_own(browser: &Browser) {
    let elsewhere = browser
        .run("return performance.getEntriesByType('resource').map(({ name }) => name).filter((name) => !name.startsWith(location.origin))")
        .await;
    assert_eq!(elsewhere, json!([]));
    assert_eq!(browser.complaints().await, Vec::<String>::new());
}

#[tokio::test]
async fn what_changes_is_seen_without_a_reload() {
    let (world, daemon, browser, addr) = page(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    browser.run("window.mark = 1").await;
    browser.until_text("#state", "ready").await;
    browser.until_text("#next-empty", "SELECT tidings.schedule('message'").await;
    browser.until_text("#dead-empty", "x-dead-letter-exchange = tidings.dlx").await;

    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', '{\"routing_key\": \"k\", \"body\": 1}', key => 'game 7')").await;
    browser.until_text("#next", "game 7").await;
    browser.until_text("#next", "in 59 min").await;
    browser.until_text("#next-under", "message · game 7").await;
    world.sql("SELECT tidings.reschedule('message', 'game 7', now())").await;
    inbox.next().await;
    browser.until_text("#hour-figure", "1").await;
    browser.until_text("#next-figure", "nothing").await;
    browser.until_text("#throughput .readout", "1 delivered").await;
    world.install("game-status");
    browser.until_text("#kinds", "game-status").await;

    // Where a row is.
    browser.click("#which").await;
    browser.type_in("message/game 7").await;
    browser.press(Key::Enter).await;
    browser.until_text("#explained", "Delivered at").await;

    only_our_own(&browser).await;
    drop(daemon);
    browser.until_text("#state", "the daemon has not answered since").await;
    browser.until("document.title.startsWith('No answer')").await;
    let mut again = world.launch().with("TIDINGS_HTTP_ADDR", &addr).ready().await;
    browser.until_text("#state", "ready").await;
    browser.until_text("#read-only", "TIDINGS_HTTP_TOKEN").await;
    assert_eq!(browser.run("return window.mark").await, 1, "it was not loaded again");
    assert!(!again.has_ended());
}

#[tokio::test]
async fn a_parked_row_is_put_back_by_the_keyboard_alone() {
    let (world, _daemon, browser, _) = page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let (first, second) = (send(&world, r#"{"no": 1}"#).await, send(&world, r#"{"no": 2}"#).await);
    browser.until_text("#parked-caption", "2 in all").await;
    world.sql(r#"UPDATE tidings.parked SET payload = '{"routing_key": "k", "body": 1}'"#).await;

    browser.tab_to(&format!("button[aria-label^='Retry the row {second}']")).await;
    browser.press(Key::Enter).await;
    give(&browser, TOKEN).await;

    assert_eq!(inbox.next().await.id(), second);
    browser.until_text("#notice", "1 row put back into the queue").await;
    browser.until_text("#parked-caption", "1 in all").await;
    // The next one has the focus.
    browser
        .until(&format!("document.activeElement.getAttribute('aria-label')?.startsWith('Retry the row {first}')"))
        .await;
    browser.press(Key::Enter).await;
    assert_eq!(inbox.next().await.id(), first);
    browser.until_text("#parked-empty", "None.").await;
    // The plots are read with the keyboard as well.
    browser.tab_to("#throughput svg").await;
    browser.press(Key::Left).await;
    browser.until_text("#throughput .readout", "1 min ago").await;
    browser.until("document.activeElement.getAttribute('aria-valuetext').includes('min ago')").await;
    only_our_own(&browser).await;
}

#[tokio::test]
async fn a_letter_is_replayed_and_one_is_dropped_once_somebody_is_sure() {
    let (world, _daemon, browser, _) = page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let one = send(&world, r#"{"routing_key": "k", "body": "one"}"#).await;
    reject(&mut inbox).await;
    let other = send(&world, r#"{"routing_key": "k", "body": "other"}"#).await;
    reject(&mut inbox).await;
    until_waiting(&world, "tidings.dead", 2).await;
    browser.run("document.querySelector('#dead-title').scrollIntoView()").await;
    browser.until_text("#dead-caption", "2 in all").await;
    browser.until_text("#dead", "rejected").await;

    browser.click(&format!("button[aria-label='Replay the dead letter {one}']")).await;
    give(&browser, TOKEN).await;
    assert_eq!(inbox.next().await.id(), one);
    browser.until_text("#notice", "1 replayed").await;
    browser.until_text("#dead-caption", "1 in all").await;

    let drop = format!("button[aria-label='Drop the dead letter {other}']");
    browser.click(&drop).await;
    browser.until_text("#drop-dialog", "Drop 1 dead letter for good?").await;
    browser.press(Key::Escape).await;
    browser.until("!document.querySelector('#drop-dialog[open]')").await;
    assert_eq!(waiting(&world, "tidings.dead").await, 1);
    browser.click(&drop).await;
    browser.click("#drop-dialog button.danger").await;
    browser.until_text("#notice", "1 dropped for good").await;
    browser.until("document.querySelector('#dead-empty').checkVisibility()").await;
    until_waiting(&world, "tidings.dead", 0).await;
    only_our_own(&browser).await;
}

#[tokio::test]
async fn a_kind_is_paused_with_a_reason_and_resumed() {
    let (world, _daemon, browser, _) = page(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    browser.click("button[aria-label='Pause the kind message']").await;
    give(&browser, TOKEN).await;
    browser.until("document.querySelector('#pause-dialog[open]')").await;
    browser.tab_to("#pause-reason").await;
    browser.type_in("the mail server is down").await;
    browser.press(Key::Enter).await;
    browser.until_text("#kinds", "paused by postgres").await;
    browser.until_text("#kinds", "until somebody resumes it: the mail server is down").await;
    let row = send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    browser.until_text("#waiting-under", "1 held").await;

    browser.click("button[aria-label='Resume the kind message']").await;

    assert_eq!(inbox.next().await.id(), row);
    browser.until_text("button[aria-label='Pause the kind message']", "Pause").await;
    browser.until_text("#waiting-under", "none held").await;
    only_our_own(&browser).await;
}

#[tokio::test]
async fn a_wrong_token_is_told_and_a_right_one_is_kept_for_the_tab() {
    let (world, _daemon, browser, addr) = page(&["message"]).await;
    send(&world, r#"{"no": 1}"#).await;
    browser.until_text("#parked-caption", "1 in all").await;
    browser.click("#parked-all button.drop").await;
    browser.click("#drop-dialog button.danger").await;
    give(&browser, "no-token-of-the-tests").await;
    browser.until_text("#token-wrong", "The token is wrong").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.parked").await, 1);
    give(&browser, TOKEN).await;
    browser.until_text("#notice", "1 row dropped for good").await;

    browser.open(&format!("http://{addr}/")).await;
    browser.until_text("#unlock", "Forget the token").await;
    browser.click("#unlock").await;
    browser.until_text("#unlock", "Give the token").await;
    assert_eq!(browser.run("return sessionStorage.length").await, 0);
    // The refusal of the wrong one is all that the browser complains of.
    let complaints = browser.complaints().await;
    assert!(complaints.iter().all(|line| line.contains("401")), "{complaints:?}");
}

#[tokio::test]
async fn without_a_token_the_page_only_shows() {
    let world = World::with(&["message"]).await;
    let mut daemon = world.daemon().await;
    send(&world, r#"{"no": 1}"#).await;
    let browser = opened(&daemon.http_addr().await).await;
    browser.until_text("#parked", "message").await;
    browser.until_text("#read-only", "Read-only").await;
    let buttons = browser.run("return [...document.querySelectorAll('button[data-acts]')].filter((button) => button.checkVisibility()).length").await;
    assert_eq!(buttons, 0);
    only_our_own(&browser).await;
}

/// What somebody wrote who means no good.
const HOSTILE: &str = r#"<img src=x onerror="hacked=1"><script>hacked=1</script>&lt;"#;

#[tokio::test]
async fn whatever_anybody_has_written_is_shown_as_text_and_does_nothing() {
    let (world, _daemon, browser, addr) = page(&["message"]).await;
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
    let (status, answer) = act(&addr, "/api/kinds/message/pause", json!({ "reason": format!("{HOSTILE}{odd}") })).await;
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
    publish(&world, "", "tidings.dead", b"secret", properties.clone()).await;
    publish(&world, "", "tidings.parking", b"secret", properties).await;
    world.put(&"<img src=x onerror=hacked=1>.wasm".replace('/', ""), b"no plugin");

    browser.open(&format!("http://{addr}/")).await;
    browser.until_text("#letters-caption", "1 in all").await;
    browser.until_text("#problems", "<img src=x onerror=hacked=1>.wasm does not serve").await;
    let shown = "a‹U+001B›[31mb‹U+202E›c‹U+007F›d↵ e";
    for (place, parts) in [
        ("#next", [HOSTILE, shown, &*long]),
        ("#parked", [HOSTILE, shown, "by <img"]),
        ("#kinds", [HOSTILE, shown, "paused by"]),
        ("#dead", [HOSTILE, shown, HOSTILE]),
        ("#letters", [HOSTILE, HOSTILE, HOSTILE]),
    ] {
        for part in parts {
            browser.until_text(place, part).await;
        }
    }
    // A question and an explanation repeat it as well.
    browser.click("#dead button.drop").await;
    browser.until_text("#drop-text", HOSTILE).await;
    browser.press(Key::Escape).await;
    browser.click("#dead button.bare").await;
    browser.until_text("#explained", "Nothing is known of the kind <img").await;
    browser.click("#next tbody tr:first-child button.bare").await;
    browser.until_text("#explained .facts", HOSTILE).await;

    let hacked = browser
        .run("return [typeof hacked, document.querySelectorAll('main img, main script, dialog img').length]")
        .await;
    assert_eq!(hacked, json!(["undefined", 0]));
    let overflow = browser.run("return document.documentElement.scrollWidth - innerWidth").await;
    assert_eq!(overflow, 0);
    let (_, overview) = get(&addr, "/api/overview").await;
    let (_, letters) = get(&addr, "/api/letters").await;
    assert!(!format!("{overview}{letters}").contains("secret"), "no body is shown");
    let complaints = browser.complaints().await;
    assert!(complaints.iter().all(|line| line.contains("/api/rows")), "{complaints:?}");
}

#[tokio::test]
async fn it_fits_a_phone_and_a_desk_in_light_and_dark() {
    let (world, _daemon, browser, addr) = page(&["message", "game-status", "game-reminder"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "k", "body": 1}', key => 'now ' || n) FROM generate_series(1, 500) AS n"#).await;
    for _ in 0..2 {
        reject(&mut inbox).await;
    }
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": 1}', key => 'offer ' || n, subject => 'shop') FROM generate_series(1, 3) AS n"#).await;
    world.sql(r#"SELECT tidings.schedule('message', now() + (n + 2) * (n + 2) * interval '47 seconds', '{"routing_key": "k", "body": 1}', key => 'feedback ' || n, subject => 'order ' || n) FROM generate_series(1, 40) AS n"#).await;
    world.sql("SELECT tidings.schedule('auction', now(), key => 'lot ' || n) FROM generate_series(1, 12) AS n").await;
    let foreign = BasicProperties::default().with_message_id("lost".into());
    publish(&world, "", "tidings.parking", b"", foreign).await;
    let (status, _) =
        act(&addr, "/api/kinds/game-status/pause", json!({ "reason": "the mail server is down", "for_seconds": 3600 }))
            .await;
    assert_eq!(status, 200);
    world.put("offers.wasm", b"no plugin");
    browser.open(&format!("http://{addr}/")).await;
    browser.until_text("#parked-caption", "3 in all").await;
    browser.until_text("#dead-caption", "2 in all").await;
    browser.until_text("#letters-caption", "1 in all").await;
    browser.until_text("#waiting-under", "12 held").await;
    browser.until_text("#problems", "offers.wasm does not serve").await;
    browser.until_text("#hour-figure", "500").await;
    browser.until_text("#kinds", "the mail server is down").await;

    for (width, dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
        browser.look(width, dark).await;
        browser.until(&format!("innerWidth === {width}")).await;
        browser.until(&format!("matchMedia('(prefers-color-scheme: dark)').matches === {dark}")).await;
        let wide = browser.run("return [...document.querySelectorAll('main *')].filter((element) => element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('thead')).map((element) => element.outerHTML.slice(0, 200))").await;
        assert_eq!(wide, json!([]), "{width}");
        assert_eq!(browser.run("return document.documentElement.scrollWidth").await, width, "it scrolls sideways");
        let theme = if dark { "dark" } else { "light" };
        browser.picture(&harness::target().join(format!("screenshots/page-{width}-{theme}.png"))).await;
        let pale = browser.run(CONTRAST).await;
        assert_eq!(pale, json!([]), "{width} {theme}: contrasts below 4.5 to 1");
    }
    // Twice as large, as some people need it.
    browser.look(640, false).await;
    browser.run("document.documentElement.style.fontSize = '200%'").await;
    browser.until("document.documentElement.scrollWidth === innerWidth").await;
    only_our_own(&browser).await;
    let unnamed = browser.run("return [...document.querySelectorAll('button, input, select, a, [tabindex=\"0\"]')].filter((element) => !(element.ariaLabel || element.getAttribute('aria-labelledby') || element.labels?.length || element.textContent)).map((element) => element.outerHTML)").await;
    assert_eq!(unnamed, Value::Array(Vec::new()));
}

/// Each text whose contrast to what is behind it is too low for some people.
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
