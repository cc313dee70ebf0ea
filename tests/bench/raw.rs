//! Measures the limits: what the daemon's client library reaches with the same queue, headers and bodies when it does
//! nothing else. Also a consumer that records when each message arrived.

use std::future::ready;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};
use time::OffsetDateTime;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::load::{BODY_BYTES, QUEUE, Stage};
use crate::report::Times;

/// The number of unconfirmed messages on one channel. A larger number is not faster.
const WINDOW: usize = 500;
/// The limit on bytes of unconfirmed bodies on one channel.
const WINDOW_BYTES: usize = 4 * 1024 * 1024;
/// The number of channels.
const CHANNELS: u32 = 4;
/// The header with the time at which a raw message was sent, in microseconds since the Unix epoch.
const SENT: &str = "sent-us";
/// Longer than the time between two messages.
const STEP_TIMEOUT: Duration = Duration::from_mins(1);

/// Publishes `messages` messages, with `WINDOW` unconfirmed ones on each channel, and waits for every confirm. Returns
/// messages per second.
pub(crate) async fn publish_and_confirm(stage: &Stage, messages: u32) -> f64 {
    publish_bodies(stage, messages, BODY_BYTES).await
}

/// [`publish_and_confirm`] with bodies of `body_bytes` bytes.
pub(crate) async fn publish_bodies(stage: &Stage, messages: u32, body_bytes: usize) -> f64 {
    let window = (WINDOW_BYTES / body_bytes).clamp(1, WINDOW);
    let mut publishers = JoinSet::new();
    let mut channels = Vec::new();
    for _ in 0..CHANNELS {
        channels.push(confirming_channel(stage).await);
    }
    let share = messages / CHANNELS;
    let begun = std::time::Instant::now();
    for channel in channels {
        publishers.spawn(async move {
            let publishes = stream::iter(0..share).map(|_| publish(&channel, body_bytes));
            publishes.buffer_unordered(window).for_each(|_| ready(())).await;
        });
    }
    while let Some(ended) = publishers.join_next().await {
        ended.expect("every message was confirmed");
    }
    f64::from(share * CHANNELS) / begun.elapsed().as_secs_f64()
}

/// The times that messages took which were published at a steady rate.
pub(crate) struct OneWay {
    /// From before the publish to the confirm.
    pub(crate) to_confirm: Times,
    /// From before the publish to the consumer.
    pub(crate) to_consumer: Times,
}

/// Publishes `rate` messages a second, and waits until each was confirmed and received.
pub(crate) async fn measure_one_way(stage: &Stage, receiver: &mut Receiver, rate: u32, seconds: u32) -> OneWay {
    let channel = confirming_channel(stage).await;
    let mut confirms = JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_secs(1) / rate);
    for _ in 0..rate * seconds {
        pace.tick().await;
        let channel = channel.clone();
        confirms.spawn(async move { publish(&channel, BODY_BYTES).await });
    }
    let to_confirm = Times::new(confirms.join_all().await.into_iter().map(|took| took.as_secs_f64() * 1000.0));
    let to_consumer = receiver.take(rate * seconds).await;
    OneWay { to_confirm, to_consumer }
}

async fn confirming_channel(stage: &Stage) -> Channel {
    let channel = stage.world.broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    channel
}

/// Publishes a message like the daemon's with a body of `body_bytes` bytes, waits for its confirm, and returns how long
/// that took.
async fn publish(channel: &Channel, body_bytes: usize) -> Duration {
    let mut headers = FieldTable::default();
    let plugin = "message@0.1.0+01234567";
    for (name, value) in [
        ("tidings-kind", "message"),
        ("tidings-plugin", plugin),
        ("tidings-exchange", "tidings"),
        ("tidings-routing-key", QUEUE),
    ] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let body = vec![b'x'; body_bytes];
    let begun = std::time::Instant::now();
    let sent_us = now_us();
    // The same number of integer headers as the daemon's. SENT replaces tidings-due-ms, so that a consumer recognises
    // raw messages.
    for (name, value) in [(SENT, sent_us), ("tidings-attempt", 1), ("tidings-replay", 0)] {
        headers.insert(name.into(), AMQPValue::LongLongInt(value));
    }
    let properties = BasicProperties::default()
        .with_message_id(Uuid::new_v4().to_string().into())
        .with_type("message".into())
        .with_app_id("tidings".into())
        .with_content_type("text/plain; charset=utf-8".into())
        .with_timestamp(u64::try_from(sent_us / 1_000_000).expect("after 1970"))
        .with_delivery_mode(2)
        .with_headers(headers);
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let published = channel.basic_publish("tidings".into(), QUEUE.into(), options, &body, properties);
    let confirmation = published.await.expect("written").await;
    assert!(matches!(confirmation, Ok(Confirmation::Ack(None))), "{confirmation:?}");
    begun.elapsed()
}

/// A consumer that acknowledges each message and records when it arrived.
pub(crate) struct Receiver {
    channel: Channel,
    arrivals: UnboundedReceiver<Arrival>,
}

/// The arrival of a message, with times in microseconds since the Unix epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// When the row was due, or when a raw message was published.
    origin_us: i64,
    /// When the consumer received the message.
    pub(crate) at_us: i64,
}

impl Receiver {
    /// Starts to consume from the queue.
    pub(crate) async fn start(stage: &Stage) -> Self {
        let channel = stage.world.broker.channel().await;
        channel.basic_qos(1_000, BasicQosOptions::default()).await.expect("a window");
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut messages = channel.basic_consume(QUEUE.into(), "".into(), options, none).await.expect("a consumer");
        let (note, arrivals) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let arrival = Arrival { at_us: now_us(), origin_us: origin_us(&message) };
                // Acknowledged before it is reported: the caller may then close the channel, and an unacknowledged
                // message would arrive again in the next round.
                if message.ack(BasicAckOptions::default()).await.is_err() || note.send(arrival).is_err() {
                    break;
                }
            }
        });
        Self { channel, arrivals }
    }

    /// The next message.
    pub(crate) async fn next(&mut self) -> Arrival {
        let arrival = tokio::time::timeout(STEP_TIMEOUT, self.arrivals.recv()).await;
        arrival.expect("a message within a minute").expect("the consumer goes on")
    }

    /// The times from origin to consumer of the next `number` messages.
    pub(crate) async fn take(&mut self, number: u32) -> Times {
        let mut times = Vec::new();
        for _ in 0..number {
            let Arrival { origin_us, at_us } = self.next().await;
            times.push(millis(at_us - origin_us));
        }
        Times::new(times)
    }

    /// Stops consuming.
    pub(crate) async fn stop(self) {
        self.channel.close(200, "measured".into()).await.expect("closed");
    }
}

/// When a raw message was sent, or when the row was due.
fn origin_us(message: &Delivery) -> i64 {
    let headers = message.properties.headers().as_ref().expect("headers").inner();
    let number = |name: &str| match headers.get(name) {
        Some(AMQPValue::LongLongInt(number)) => Some(*number),
        _ => None,
    };
    number(SENT).or_else(|| Some(number("tidings-due-ms")? * 1000)).expect("one of the two")
}

/// The clock of this machine, on which both servers run too, in microseconds since the Unix epoch.
pub(crate) fn now_us() -> i64 {
    i64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1000).expect("within 292,000 years")
}

/// Converts microseconds to milliseconds.
pub(crate) fn millis(micros: i64) -> f64 {
    f64::from(i32::try_from(micros).expect("less than half an hour")) / 1000.0
}
