//! The page never shows the age of an answer as lateness, and shows a row that is late.

use std::time::Duration;

use harness::browser::Browser;
use harness::world::World;
use sqlx::Connection as _;

/// Notes every text of the page that says that a row is late.
const WATCH: &str = "window.late = new Set();
    setInterval(() => {
        const texts = [...document.querySelectorAll('time[data-form=due]')].map((element) => element.textContent);
        texts.push(document.title, document.getElementById('late-figure').textContent);
        texts.filter((text) => /late/i.test(text)).forEach((text) => window.late.add(text));
    }, 20);";

async fn page_of(world: &World) -> (harness::daemon::Daemon, Browser) {
    let mut daemon = world.start_daemon().await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/", daemon.http_addr().await)).await;
    browser.wait_until("document.body.dataset.loaded").await;
    (daemon, browser)
}

/// The pictures are for people; what the page says is checked.
#[tokio::test]
async fn rows_that_are_delivered_on_time_are_never_shown_as_late_at_0_33_and_1000_rows_a_second() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["k"]).await;
    let (_daemon, browser) = page_of(&world).await;
    browser.run_script(WATCH).await;

    let mut delivered = 0;
    for (rate, rows) in [(0, 0), (33, 333), (1_000, 6_000)] {
        world
            .sql(&format!(
                r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
                   SELECT 'message', 'row ' || n || ' at {rate}', now() + interval '3 seconds' + n * interval '1 second' / greatest({rate}, 1),
                       '{{"routing_key": "k", "body": 1}}'
                   FROM generate_series(1, {rows}) AS n"#
            ))
            .await;
        // Half of them are delivered, and the page has been told.
        let half = delivered + rows / 2;
        world.wait_until(&format!("SELECT count(*) >= {half} FROM tidings.deliveries")).await;
        browser
            .wait_until(&format!(
                "Number(document.getElementById('hour-figure').textContent.replace(/\\D/g, '')) >= {half}"
            ))
            .await;
        browser
            .write_screenshot(&harness::target().join(format!("screenshots/page-at-{rate}-rows-a-second.png")))
            .await;
        delivered += rows;
        world.wait_until("SELECT count(*) = 0 FROM tidings.schedules").await;
        browser.wait_until_text("#next-figure", "nothing").await;
    }

    let shown = browser.run_script("return [...window.late]").await;
    let on_time: bool = world
        .value("SELECT coalesce(max(finished_at - due_at), '0') < interval '1 second' FROM tidings.deliveries")
        .await;
    assert!(!on_time || shown.as_array().is_some_and(Vec::is_empty), "{shown}");
}

#[tokio::test]
async fn a_row_that_cannot_be_delivered_is_shown_as_late_until_it_is() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let (_daemon, browser) = page_of(&world).await;
    world
        .sql(r#"SELECT tidings.schedule('message', now() + interval '2 seconds', '{"routing_key": "k", "body": 1}')"#)
        .await;
    // Locked, it cannot be delivered.
    let mut connection = world.db.acquire().await.expect("a connection");
    let mut transaction = connection.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules FOR UPDATE").execute(&mut *transaction).await.expect("locked");

    browser.wait_until_text("#next", "late by").await;
    browser.wait_until_text("#next-figure", "late by").await;
    browser.wait_until("document.title.startsWith('Late by')").await;
    transaction.rollback().await.expect("free again");
    assert!(inbox.next_within(Duration::from_secs(30)).await.is_some());
    browser.wait_until_text("#next-figure", "nothing").await;
    browser.wait_until_text("#late-figure", "on time").await;
}
