//! One scenario from beginning to end: a game is created, moved and played while consumers fail, and another game is
//! deleted. The other files test each of these promises separately.

use harness::consumer::{Inbox, Received};
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicPublishOptions};
use sqlx::Executor as _;
use uuid::Uuid;

use crate::dead_letters::replay::{count_messages, launch_with_frequent_passes};

/// The demo's application. A minute of its games lasts a tenth of a second.
const GAMES: &str = include_str!("../../demo/games.sql");

/// The ids of the pending rows of one game: its reminders 60 and 15 minutes ahead, its start and its end.
async fn pending_ids(world: &World) -> [Uuid; 4] {
    world.value("SELECT array_agg(id ORDER BY due_at) FROM tidings.schedules").await
}

/// Creates a game that starts in 8 seconds and whose first reminder is due in 2 seconds. No other game may be pending.
async fn create_game(world: &World, title: &str) -> [Uuid; 4] {
    world.sql(&format!("INSERT INTO games (title, starts_at) VALUES ('{title}', now() + interval '8 seconds')")).await;
    pending_ids(world).await
}

async fn acknowledge(received: &Received) {
    received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
}

/// Receives two reminders. Acknowledges one, and rejects `failing` each of the three times it arrives.
async fn receive_reminders(world: &World, inbox: &mut Inbox, failing: Uuid) -> Vec<Received> {
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let received = inbox.next_unacknowledged().await;
        match (received.id() == failing, received.number("tidings-replay")) {
            (false, _) => acknowledge(&received).await,
            (true, 0 | 1) => inbox.reject(&received).await,
            // The third is rejected below, after the start. If it were rejected shortly before, another replay would
            // depend on when the next pass happens.
            (true, _) => {}
        }
        seen.push(received);
    }
    world.wait_until("SELECT clock_timestamp() > starts_at FROM games").await;
    let last = seen.iter().rfind(|received| received.id() == failing).expect("it came");
    inbox.reject(last).await;
    seen
}

/// Receives two status changes. Rejects `failing` three times, as if the consumer's database were away, and then
/// acknowledges it.
async fn receive_status_changes(inbox: &mut Inbox, failing: Uuid) -> Vec<Received> {
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

/// The `tidings-replay` numbers with which a message arrived, in order; the first is 0.
fn replay_numbers(seen: &[Received], id: Uuid) -> Vec<i64> {
    seen.iter().filter(|received| received.id() == id).map(|received| received.number("tidings-replay")).collect()
}

/// Checks that the queue is empty: a message that is published now is the next to arrive.
async fn check_queue_is_empty(inbox: &mut Inbox) {
    let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    let queue = inbox.queue.as_str().into();
    let published = inbox.channel.basic_publish("".into(), queue, options, b"the end", properties).await;
    published.expect("written").await.expect("taken");
    assert_eq!(inbox.next().await.text(), "the end");
}

#[tokio::test]
async fn a_moved_game_sends_its_reminders_and_status_changes_despite_failures_and_a_deleted_one_sends_nothing() {
    let world = World::with_plugins(&["game-reminder", "game-status"]).await;
    let mut reminders = world.inbox(&["game.reminder_due"]).await;
    let mut changes = world.inbox(&["game.status_transition_due"]).await;
    let mut daemon = launch_with_frequent_passes(&world).start_ready().await;
    world.db.execute(GAMES).await.expect("the table of games");

    // The messages that must not arrive, those of the deleted game and of the moved game's first times, would be due
    // before the last message that is awaited below.
    let deleted = create_game(&world, "Saturday go").await;
    world.sql("DELETE FROM games").await;
    let created = create_game(&world, "Friday chess").await;
    world.sql("UPDATE games SET starts_at = starts_at + interval '1 second'").await;
    let scheduled = pending_ids(&world).await;
    assert!(scheduled.iter().all(|id| !created.contains(id) && !deleted.contains(id)), "every row has a new id");
    let starts_ms: i64 = world.value("SELECT floor(extract(epoch FROM starts_at) * 1000)::bigint FROM games").await;

    let [hour_ahead, quarter_ahead, start, end] = scheduled;
    let (reminded, changed) = tokio::join!(
        receive_reminders(&world, &mut reminders, hour_ahead),
        receive_status_changes(&mut changes, start)
    );

    // Nine messages arrived, and all nine are accounted for: none was of the deleted game or of the first times.
    assert_eq!(
        (replay_numbers(&reminded, hour_ahead), replay_numbers(&reminded, quarter_ahead)),
        (vec![0, 1, 2], vec![0])
    );
    assert_eq!((replay_numbers(&changed, start), replay_numbers(&changed, end)), (vec![0, 1, 2, 3], vec![0]));
    assert!(reminded.iter().all(|received| received.number("tidings-expires-ms") == starts_ms), "until the start");
    assert!(changed.iter().all(|received| !received.headers().contains_key("tidings-expires-ms")), "however late");

    // The reminder that was rejected after the start is not replayed, and no other message arrives.
    daemon.wait_for_line("expired=1").await;
    assert_eq!((count_messages(&world, "tidings.dead").await, count_messages(&world, "tidings.parking").await), (0, 0));
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    for inbox in [&mut reminders, &mut changes] {
        check_queue_is_empty(inbox).await;
    }

    let delivered: [Uuid; 4] = world
        .value("SELECT array_agg(id ORDER BY due_at) FROM tidings.deliveries WHERE outcome = 'delivered' AND finished_at >= due_at")
        .await;
    assert_eq!(delivered, scheduled);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 4, "and nothing else was sent");
}
