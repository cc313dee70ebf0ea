//! Intakes on the page: what waits in their queues, what the daemon takes and refuses, and why it takes nothing.

use fantoccini::key::Key;
use harness::browser::Browser;
use harness::daemon::Daemon;
use harness::world::World;
use lapin::options::{BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Consumer};
use serde_json::json;

use crate::intake::{Publisher, QUEUE, headers, launch, table, text};
use crate::operations::page::{HOSTILE, check_no_foreign_requests, open_browser_at, start_page};

/// Starts a daemon with these intakes and opens its page in a browser.
async fn open_page(world: &World, intakes: &str) -> (Daemon, Browser) {
    let mut daemon = launch(world).with("TIDINGS_INTAKE", intakes).start_ready().await;
    let browser = open_browser_at(&daemon.http_addr().await).await;
    (daemon, browser)
}

/// The properties of a message whose row waits for the whole test.
fn in_an_hour() -> BasicProperties {
    headers([("x-delay", AMQPValue::LongInt(3_600_000))])
}

/// Declares the intake's queue as the daemon does, and consumes from it as its only consumer, one message at a time. The
/// daemon gets nothing from it until the channel is closed.
async fn occupy_queue(world: &World) -> (Channel, Consumer) {
    let channel = world.broker.channel().await;
    let arguments = table([("x-queue-type", text("classic")), ("x-dead-letter-exchange", text("tidings.dlx"))]);
    channel.queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
    channel.basic_qos(1, BasicQosOptions::default()).await.expect("a limit");
    let alone = BasicConsumeOptions { exclusive: true, ..BasicConsumeOptions::default() };
    let consumer =
        channel.basic_consume(QUEUE.into(), "".into(), alone, FieldTable::default()).await.expect("a consumer");
    (channel, consumer)
}

#[tokio::test]
async fn the_page_shows_what_an_intake_takes_and_what_it_refuses() {
    let world = World::with_plugins(&["message"]).await;
    let (_daemon, browser) = open_page(&world, "orders.delayed=orders").await;
    browser.wait_until_text("#intakes td:nth-child(1)", &format!("orders.delayed → orders\nqueue {QUEUE}")).await;
    browser.wait_until_text("#intakes td:nth-child(2)", "0\n1 daemon takes them").await;
    browser.wait_until_text("#intakes td:nth-child(3)", "0\n0 a second").await;
    assert_eq!(browser.text("#intakes td:nth-child(4)").await, "0", "nothing is refused, so no link is shown");

    let publisher = Publisher::new(&world).await;
    publisher.publish("k", in_an_hour(), b"good").await;
    publisher.publish("k", headers([("x-delay", text("soon"))]), b"bad").await;

    browser.wait_until_text("#intakes td:nth-child(3)", "1\nunder 0.1 a second").await;
    let refused = "1\nlast: x-delay is not a whole number\nsee the parked letters";
    browser.wait_until_text("#intakes td:nth-child(4)", refused).await;
    browser.wait_until_text("#next", "relay").await;
    let rows: i64 = world.value("SELECT count(*) FROM tidings.schedules WHERE kind = 'relay'").await;
    assert_eq!(rows, 1, "the refused message is no row");
    // The refused message is where the link leads to, and the keyboard follows it.
    browser.tab_to("#intakes a").await;
    browser.press(Key::Enter).await;
    browser.wait_until("document.activeElement.id === 'letters-title'").await;
    browser.wait_until_text("#letters-caption", "1 in all").await;
    for part in [QUEUE, "x-delay is not a whole number"] {
        browser.wait_until_text("#letters", part).await;
    }
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn the_page_says_why_an_intake_takes_no_messages_until_it_does() {
    let world = World::with_plugins(&["message"]).await;
    let (channel, _consumer) = occupy_queue(&world).await;
    let (_daemon, browser) = open_page(&world, "orders.delayed=orders").await;

    browser.wait_until_text("#intakes td:nth-child(1) .bad-text", "this daemon takes no messages: ").await;
    let publisher = Publisher::new(&world).await;
    for _ in 0..3 {
        publisher.publish("k", in_an_hour(), b"an order").await;
    }
    // The other consumer holds one of them.
    browser.wait_until_text("#intakes td:nth-child(2)", "2\n1 daemon takes them").await;

    channel.close(200, "it is enough".into()).await.expect("closed");
    browser.wait_until_text("#intakes td:nth-child(2)", "0\n1 daemon takes them").await;
    browser.wait_until_text("#intakes td:nth-child(3)", "3\n").await;
    browser.wait_until("!document.querySelector('#intakes .bad-text')").await;
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn names_of_intakes_and_texts_of_publishers_are_shown_as_plain_text() {
    let world = World::with_plugins(&["message"]).await;
    let (_daemon, browser) = open_page(&world, "orders.delayed=orders, <b>in</b>=<i>out</i>").await;

    let hostile = headers([("tidings-action", text(HOSTILE))]);
    Publisher::new(&world).await.publish_to("<b>in</b>", "k", hostile, b"an order").await;

    for part in ["orders.delayed → orders", "<b>in</b> → <i>out</i>", "queue tidings.intake.<b>in</b>"] {
        browser.wait_until_text("#intakes", part).await;
    }
    // The daemon puts the publisher's text between quotation marks.
    browser.wait_until_text("#intakes", &format!("last: tidings-action is {HOSTILE:?}")).await;
    let hacked = browser
        .run_script("return [typeof hacked, document.querySelectorAll('#intakes :is(b, i, img, script)').length]")
        .await;
    assert_eq!(hacked, json!(["undefined", 0]));
    for width in [1280, 390] {
        browser.set_view(width, false).await;
        browser
            .wait_until(&format!("innerWidth === {width} && document.documentElement.scrollWidth === {width}"))
            .await;
    }
    check_no_foreign_requests(&browser).await;
}

#[tokio::test]
async fn without_intakes_the_page_has_no_card_for_them() {
    let (_world, _daemon, browser, _) = start_page(&["message"]).await;
    browser.wait_until_text("#kinds", "message").await;
    browser.wait_until("document.querySelector('#intakes-section').hidden").await;
    assert_eq!(browser.text("#intakes-section").await, "");
    check_no_foreign_requests(&browser).await;
}
