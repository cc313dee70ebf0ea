//! The whole scenario at once: a game from its creation to its end, moved on the way, with consumers that fail, and
//! another that is deleted. The other files have what each part promises by itself.

use harness::consumer::{Inbox, Received};
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicPublishOptions};
use sqlx::Executor as _;
use uuid::Uuid;

use crate::dead_letters::replay::{often, waiting};

/// The application, which is that of the demo. A minute of its games lasts a tenth of a second.
const GAMES: &str = include_str!("../../demo/games.sql");

/// What is pending of one game: the reminders 60 and 15 minutes ahead, its start and its end.
async fn pending(world: &World) -> [Uuid; 4] {
    world.value("SELECT array_agg(id ORDER BY due_at) FROM tidings.schedules").await
}

/// Creates a game that starts in 8 seconds, when no other is pending. Its first reminder is due in 2.
async fn create(world: &World, title: &str) -> [Uuid; 4] {
    world.sql(&format!("INSERT INTO games (title, starts_at) VALUES ('{title}', now() + interval '8 seconds')")).await;
    pending(world).await
}

async fn acknowledge(received: &Received) {
    received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
}

/// Receives two reminders. It cannot send that one, which comes three times, and sends the other.
async fn remind(world: &World, inbox: &mut Inbox, failing: Uuid) -> Vec<Received> {
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let received = inbox.next_unacknowledged().await;
        match (received.id() == failing, received.number("tidings-replay")) {
            (false, _) => acknowledge(&received).await,
            (true, 0 | 1) => inbox.reject(&received).await,
            // The last time it fails only after the start. If it failed shortly before, whether the letter came once more
            // would depend on the moment of the next pass.
            (true, _) => {}
        }
        seen.push(received);
    }
    world.until("SELECT clock_timestamp() > starts_at FROM games").await;
    let last = seen.iter().rfind(|received| received.id() == failing).expect("it came");
    inbox.reject(last).await;
    seen
}

/// Receives two status changes. It fails at that one three times, as if its own database were away, and then succeeds.
async fn change(inbox: &mut Inbox, failing: Uuid) -> Vec<Received> {
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let received = inbox.next_unacknowledged().await;
        if received.id() == failing && received.number("tidings-replay") < 3 {
            inbox.reject(&received).await;
        } else {
            acknowledge(&received).await;
        }
        seen.push(received);
    }
    seen
}

/// The replays of a message, in the order in which they came; the first time it comes is 0.
fn replays(seen: &[Received], id: Uuid) -> Vec<i64> {
    seen.iter().filter(|received| received.id() == id).map(|received| received.number("tidings-replay")).collect()
}

/// Nothing is in the queue any more: what is put there now is the next that comes.
async fn nothing_else_came(inbox: &mut Inbox) {
    let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    let queue = inbox.queue.as_str().into();
    let published = inbox.channel.basic_publish("".into(), queue, options, b"the end", properties).await;
    published.expect("written").await.expect("taken");
    assert_eq!(inbox.next().await.text(), "the end");
}

#[tokio::test]
async fn a_moved_game_reminds_until_it_starts_changes_its_status_until_it_succeeds_and_a_deleted_one_sends_nothing() {
    let world = World::with(&["game-reminder", "game-status"]).await;
    let mut reminders = world.inbox(&["game.reminder_due"]).await;
    let mut changes = world.inbox(&["game.status_transition_due"]).await;
    let mut daemon = often(&world).ready().await;
    world.db.execute(GAMES).await.expect("the table of games");

    // What must not come, of the deleted game and at the first times of the moved one, would be due before the last that
    // is awaited below.
    let deleted = create(&world, "Saturday go").await;
    world.sql("DELETE FROM games").await;
    let created = create(&world, "Friday chess").await;
    world.sql("UPDATE games SET starts_at = starts_at + interval '1 second'").await;
    let scheduled = pending(&world).await;
    assert!(scheduled.iter().all(|id| !created.contains(id) && !deleted.contains(id)), "every row has a new id");
    let starts_ms: i64 = world.value("SELECT floor(extract(epoch FROM starts_at) * 1000)::bigint FROM games").await;

    let [hour_ahead, quarter_ahead, start, end] = scheduled;
    let (reminded, changed) = tokio::join!(remind(&world, &mut reminders, hour_ahead), change(&mut changes, start));

    // Nine messages, and these are nine: nothing of the deleted game was among them, and nothing at the first times.
    assert_eq!((replays(&reminded, hour_ahead), replays(&reminded, quarter_ahead)), (vec![0, 1, 2], vec![0]));
    assert_eq!((replays(&changed, start), replays(&changed, end)), (vec![0, 1, 2, 3], vec![0]));
    assert!(reminded.iter().all(|received| received.number("tidings-expires-ms") == starts_ms), "until the start");
    assert!(changed.iter().all(|received| !received.headers().contains_key("tidings-expires-ms")), "however late");

    // The reminder that was rejected after the start is not seen again, nor anything else.
    daemon.wait_for_line("expired=1").await;
    assert_eq!((waiting(&world, "tidings.dead").await, waiting(&world, "tidings.parking").await), (0, 0));
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    for inbox in [&mut reminders, &mut changes] {
        nothing_else_came(inbox).await;
    }

    let delivered: [Uuid; 4] = world
        .value("SELECT array_agg(id ORDER BY due_at) FROM tidings.deliveries WHERE outcome = 'delivered' AND finished_at >= due_at")
        .await;
    assert_eq!(delivered, scheduled);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 4, "and nothing else was sent");
}
