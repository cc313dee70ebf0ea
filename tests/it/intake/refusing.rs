//! Bad input is parked with the reason, and the next message goes on.

use harness::raw::{RawPublisher, nested};
use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::intake::{FROM, Publisher, headers, inbox, launch, start, text, text_of};

const TEN_YEARS_MS: i64 = 315_360_000_000;

#[tokio::test]
async fn a_message_that_cannot_become_a_row_is_parked_with_the_reason_and_the_next_one_goes_on() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = launch(&world)
        .with("TIDINGS_INTAKE_MAX_BODY", 1_000)
        .with("TIDINGS_INTAKE_KINDS", "message, mail")
        .start_ready()
        .await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    let mut parking = world.broker.inbox("amq.topic", "tidings.parking", &[], FieldTable::default()).await;
    let of_kind = |kind: &str| headers([("tidings-kind", text(kind))]);
    let long = "k".repeat(256);
    for (properties, body, reason) in [
        (headers([("x-delay", text("soon"))]), "1", "x-delay is not a whole number"),
        (headers([("x-delay", AMQPValue::Double(1.5))]), "2", "x-delay is not a whole number"),
        (headers([("x-delay", AMQPValue::LongLongInt(TEN_YEARS_MS + 1))]), "3", "x-delay is more than ten years"),
        (headers([("tidings-due", text("tomorrow"))]), "4", "tidings-due is \"tomorrow\", not a time of RFC 3339"),
        (headers([("tidings-due", AMQPValue::LongInt(1))]), "5", "tidings-due is not a text"),
        (
            headers([("tidings-due-ms", AMQPValue::LongLongInt(i64::MAX))]),
            "6",
            "tidings-due-ms is more than ten years ahead",
        ),
        (
            headers([("tidings-action", text("forget"))]),
            "7",
            "tidings-action is \"forget\", not schedule, cancel or reschedule",
        ),
        (headers([("tidings-action", text("cancel"))]), "8", "its tidings-action needs tidings-key or tidings-subject"),
        (
            headers([("tidings-on-conflict", text("merge"))]),
            "9",
            "tidings-on-conflict is \"merge\", not replace, keep or error",
        ),
        (headers([("tidings-key", text(&long))]), "10", "tidings-key has 256 bytes, not 1 to 255"),
        (headers([("tidings-subject", text("a\0b"))]), "11", "tidings-subject contains NUL"),
        (of_kind("Mail"), "12", "tidings-kind is \"Mail\": kind must match"),
        (of_kind("invoice"), "13", "tidings-kind is \"invoice\", which TIDINGS_INTAKE_KINDS does not allow"),
        (of_kind("mail"), "no JSON", "its tidings-kind needs a body that is JSON: expected"),
        (of_kind("mail"), r#""\u0000""#, "payload must not contain \\u0000, which PostgreSQL cannot store"),
        (
            of_kind("mail"),
            &"1".repeat(1_001),
            "its body has 1001 bytes, more than TIDINGS_INTAKE_MAX_BODY allows (1000)",
        ),
        (
            headers([
                ("x-delay", AMQPValue::LongInt(60_000)),
                ("tidings-expires-ms", AMQPValue::LongLongInt(9_999_999_999_999)),
            ]),
            "14",
            "tidings-expires-ms is more than ten years ahead",
        ),
    ] {
        let properties =
            properties.with_message_id(format!("id {body}").get(..9.min(body.len() + 3)).unwrap_or("id").into());
        publisher.publish("the.key", properties, body.as_bytes()).await;
        let refused = parking.next().await;
        assert_eq!(refused.text(), body);
        let given = text_of(&refused, "tidings-parked-reason");
        assert!(given.starts_with(reason), "{given} does not begin with {reason}");
        assert_eq!(text_of(&refused, "tidings-intake"), crate::intake::QUEUE);
        publisher.publish("k", BasicProperties::default(), b"next").await;
        assert_eq!(inbox.next().await.text(), "next");
    }
    daemon.wait_for_line("refused a message, which is parked with the reason").await;
}

#[tokio::test]
async fn a_row_that_postgresql_refuses_takes_no_other_row_of_its_batch_along() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    world
        .sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.subject LIKE 'bad%' THEN RAISE EXCEPTION 'not this subject: %', NEW.subject; END IF; RETURN NEW; END $$",
        )
        .await;
    world.sql("CREATE TRIGGER refuse BEFORE INSERT ON tidings.schedules FOR EACH ROW EXECUTE FUNCTION refuse()").await;
    let publisher = Publisher::new(&world).await;
    let deadline: i64 = world.value("SELECT floor(extract(epoch FROM now() + interval '5 s') * 1000)::bigint").await;
    for number in 0..100 {
        let mut own = crate::intake::table([
            ("x-delay", AMQPValue::LongInt(60_000)),
            ("tidings-subject", text(&if number % 33 == 7 { format!("bad {number}") } else { "good".into() })),
        ]);
        if number == 50 {
            // It would expire before it is due.
            own.insert("tidings-expires-ms".into(), AMQPValue::LongLongInt(deadline + 30_000));
        }
        publisher.publish("k", BasicProperties::default().with_headers(own), number.to_string().as_bytes()).await;
    }
    let _daemon = start(&world).await;
    let mut parking = world.broker.inbox("amq.topic", "tidings.parking", &[], FieldTable::default()).await;
    let mut refused = Vec::new();
    for _ in 0..4 {
        let letter = parking.next().await;
        refused.push((letter.text().to_owned(), text_of(&letter, "tidings-parked-reason")));
    }
    refused.sort();
    let expected = [
        ("40", "not this subject: bad 40"),
        ("50", "expires_at must be after due_at"),
        ("7", "not this subject: bad 7"),
        ("73", "not this subject: bad 73"),
    ];
    assert_eq!(refused, expected.map(|(body, reason)| (body.to_owned(), reason.to_owned())));
    world.wait_until("SELECT count(*) = 96 FROM tidings.schedules").await;
}

#[tokio::test]
async fn a_refused_message_goes_through_its_intake_again_when_a_person_puts_it_back() {
    let world = World::empty().await;
    let daemon = launch(&world).with("TIDINGS_INTAKE_MAX_BODY", 10).start_ready().await;
    let publisher = Publisher::new(&world).await;
    publisher.publish("the.key", headers([("own", text("kept"))]), b"longer than ten bytes").await;
    let parked = async || world.manage("GET", &format!("queues/{}/tidings.parking", world.name), None)["messages"] == 1;
    harness::eventually("it is parked", async || parked().await.then_some(())).await;
    daemon.stop().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let (code, output) = world.tidings(["parked", "retry", "--all"]).await;
    assert_eq!(code, 0, "{output}");
    let received = inbox.next().await;
    assert_eq!((received.text(), received.delivery.routing_key.as_str()), ("longer than ten bytes", "the.key"));
    assert_eq!(text_of(&received, "own"), "kept");
}

#[tokio::test]
async fn headers_that_cannot_be_read_are_parked_and_stop_nothing() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let mut parking = world.broker.inbox("amq.topic", "tidings.parking", &[], FieldTable::default()).await;
    let (_, port) = world.ports();
    let name = world.name.clone();
    let hostile = tokio::task::spawn_blocking(move || {
        let mut publisher = RawPublisher::connect(port, &name);
        publisher.publish(crate::intake::QUEUE, &nested(b"n", 20_000), b"nested");
    });
    hostile.await.expect("published");
    let refused = parking.next().await;
    assert_eq!(refused.text(), "nested");
    assert!(text_of(&refused, "tidings-parked-reason").starts_with("its headers cannot be read"));
    Publisher::new(&world).await.publish_to(FROM, "k", BasicProperties::default(), b"next").await;
    assert_eq!(inbox.next().await.text(), "next");
}
