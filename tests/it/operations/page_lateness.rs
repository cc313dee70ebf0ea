//! The page never shows the age of an answer as lateness, and shows a row that is late.

use std::time::Duration;

use harness::browser::Browser;
use harness::world::World;
use sqlx::Connection as _;

/// Notes every text of the page that says that a row is late.
const WATCH: &str = "window.late = [];
    setInterval(() => {
        const texts = [...document.querySelectorAll('time[data-form=due]')].map((element) => element.textContent);
        texts.push(document.title, document.getElementById('late-figure').textContent);
        window.late.push(...texts.filter((text) => /late/i.test(text)));
    }, 20);";

async fn page_of(world: &World) -> (harness::daemon::Daemon, Browser) {
    let mut daemon = world.start_daemon().await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/", daemon.http_addr().await)).await;
    browser.wait_until("document.body.dataset.loaded").await;
    (daemon, browser)
}

#[tokio::test]
async fn rows_that_are_delivered_on_time_are_never_shown_as_late() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["k"]).await;
    let (_daemon, browser) = page_of(&world).await;
    browser.run_script(WATCH).await;

    // 33 rows a second for ten seconds.
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now() + interval '1 second' + n * interval '30 milliseconds', '{"routing_key": "k", "body": 1}'
               FROM generate_series(1, 333) AS n"#,
        )
        .await;
    browser.wait_until_text("#next", "message").await;
    world.wait_until("SELECT count(*) = 0 FROM tidings.schedules").await;
    browser.wait_until_text("#next-figure", "nothing").await;

    let shown = browser.run_script("return window.late").await;
    let on_time: bool =
        world.value("SELECT max(finished_at - due_at) < interval '1 second' FROM tidings.deliveries").await;
    assert!(!on_time || shown.as_array().is_some_and(Vec::is_empty), "{shown}");
}

#[tokio::test]
async fn a_row_that_is_late_is_shown_as_late_by_its_age_in_the_last_answer() {
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
