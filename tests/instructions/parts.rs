//! The parts that are counted. Each is what the daemon does for one row, with the same row in every run.
//!
//! Must never depend on the clock, on randomness, or on a server.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use harness::world::World;
use tidings::broker::write_message;
use tidings::model::clock::DatabaseClock;
use tidings::model::event::{BuiltEvent, Event};
use tidings::model::message::Message;
use tidings::model::schedule::Schedule;
use tidings::plugins::{Engine, Metering, Plugin, PluginSet};
use tidings::store::parse_headers;
use tidings_core::queue::{Look, Outlook, Promise};
use tidings_core::reason::Reason;
use tidings_core::{Action, Batch, ClaimResult, Core, DeliveryEnd, Environment, Event as CoreEvent, Lane};
use time::OffsetDateTime;
use uuid::Uuid;

/// The rows of a batch of calls: more than the daemon builds on its own thread, where a call that valgrind makes slow would be moved
/// to another.
const BATCH: usize = 100;

/// One part.
pub(crate) struct Part {
    /// What one repetition does.
    pub(crate) name: &'static str,
    /// Does it so many times.
    pub(crate) repeat: fn(u64),
    /// The numbers of repetitions that are compared.
    pub(crate) few: u64,
    pub(crate) many: u64,
}

/// All of them.
pub(crate) const PARTS: [Part; 4] = [
    Part { name: "reading the headers of a row", repeat: read_headers, few: 100, many: 1_100 },
    Part { name: "an event as a message and its frames", repeat: write_messages, few: 100, many: 1_100 },
    Part { name: "the core, from notification to settled", repeat: run_core, few: 100, many: 1_100 },
    Part { name: "a batch of 100 calls of a plugin", repeat: call_plugin, few: 2, many: 102 },
];

fn read_headers(repetitions: u64) {
    let json = r#"{"locale": "en", "tenant": "a-tenant", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#;
    for _ in 0..repetitions {
        black_box(parse_headers(black_box(json)));
    }
}

fn write_messages(repetitions: u64) {
    let schedule = row();
    for _ in 0..repetitions {
        let headers = vec![("tenant".to_owned(), "a-tenant".to_owned())];
        let (key, media_type) = ("orders.paid".to_owned(), "application/json".to_owned());
        let event = Event::new(key, media_type, vec![b'x'; 400], headers).expect("within the limits");
        black_box(event.digest());
        let built = BuiltEvent { event, built_ms: 0, expires_ms: None, plugin: "message@1.0.0+01234567".into() };
        let message = Message::new(&schedule, built, "tidings", 1_000).expect("it has no deadline");
        let mut frames = Vec::new();
        write_message(&mut frames, 1, "tidings", &message, 131_072);
        black_box(frames);
    }
}

/// A notification, a look, a claim of one row, its delivery, and a sleep.
fn run_core(repetitions: u64) {
    let environment = Environment { broker_open: true, connections: 4, doubt: 0, knows_kinds: true };
    let epoch = OffsetDateTime::UNIX_EPOCH;
    let mut core = Core::new(Duration::from_secs(5), None);
    let mut now = Duration::ZERO;
    for number in 0..repetitions {
        now += Duration::from_millis(10);
        core.handle(now, CoreEvent::Woken(Reason::Notification.into()));
        let mut rows = 1;
        for _ in 0..20 {
            let xid = i64::try_from(number).expect("few");
            let event = match core.next(now, environment) {
                Action::Sleep(..) => break,
                Action::Hold => CoreEvent::Held(false),
                Action::Release(_) => CoreEvent::Released,
                Action::Sweep => CoreEvent::Swept(Some((now, look(epoch + now, rows > 0, xid)))),
                Action::Look => CoreEvent::Looked(now, look(epoch + now, rows > 0, xid)),
                Action::Claim(request) => {
                    let batch = (rows > 0).then_some(Batch { xid, large: false, rows });
                    rows = 0;
                    let outlook = Outlook { due: false, next_in: None };
                    let range = request.range;
                    core.handle(
                        now,
                        CoreEvent::Claimed(ClaimResult {
                            range,
                            asked_at: now,
                            at: epoch + now,
                            outlook,
                            behind: Duration::ZERO,
                            batch,
                        }),
                    );
                    if batch.is_none() {
                        continue;
                    }
                    let end = DeliveryEnd::Settled { some_left: true, some_stay: false };
                    CoreEvent::DeliveryEnded(Lane { range, large: false }, end)
                }
            };
            core.handle(now, event);
        }
    }
    black_box(core);
}

fn look(at: OffsetDateTime, due: bool, next_xid: i64) -> Look {
    Look {
        at,
        from: at - Duration::from_mins(1),
        first: due.then_some(at),
        oldest_xid: next_xid,
        outlook: Outlook { due, next_in: None },
        held_for_us: Vec::new(),
        not_claimable_first: false,
        turn_in: None,
        has_limits: false,
        promise: Promise { until: OffsetDateTime::UNIX_EPOCH, next_xid },
        below: None,
    }
}

fn call_plugin(repetitions: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        // Without a state directory the plugin is compiled in this process.
        let engine = Engine::new(None, Metering::Time).expect("an engine");
        // Valgrind makes everything fifty times as slow.
        let settings = harness::target().join("instructions.toml");
        std::fs::write(&settings, "[limits]\ncpu-ms = 60000\nwall-ms = 60000\n").expect("written");
        let plugin = Plugin::open(&engine, &World::built_plugin("message"), Some(&settings)).await.expect("it serves");
        let set = PluginSet::of([Arc::new(plugin)]);
        for _ in 0..repetitions {
            let clock = DatabaseClock::new(OffsetDateTime::UNIX_EPOCH, tokio::time::Instant::now());
            let built = set.build(vec![row(); BATCH], clock).await;
            assert!(built.iter().all(|build| matches!(build.outcome, Some(Ok(_)))), "{built:?}");
        }
    });
}

fn row() -> Schedule {
    Schedule {
        id: Uuid::from_u128(7),
        kind: "message".into(),
        key: Some("order-7".into()),
        subject: None,
        due_at: OffsetDateTime::UNIX_EPOCH,
        expires_at: None,
        payload: format!(r#"{{"routing_key": "orders.paid", "body": "{}"}}"#, "x".repeat(400)),
        headers: vec![("locale".into(), "en".into())],
        attempts: 0,
        failures: 0,
        refusals: 0,
        untried_since: None,
        recurrence: None,
        nominal_at: None,
        line: None,
        priority: 4,
    }
}
