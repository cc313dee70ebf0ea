//! The consumer of the demo: prints each message with its lateness, and rejects some of them to show replays.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use lapin::options::{BasicAckOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use testkit::EVENT_TIMEOUT;
use testkit::consumer::{Broker, Inbox, Received};

use crate::Announced;

/// How many times the consumer rejects the change to `IN_PROGRESS` before it handles it.
const FAILURES: i64 = 2;

/// A consumer of the queue `demo`.
pub(super) struct Consumer(Inbox);

/// What the consumer does with a message.
#[derive(Clone, Copy)]
enum Answer {
    /// Acknowledges the message.
    Handles,
    /// Rejects the message; it will handle a later replay.
    Fails,
    /// Rejects the message and all its replays.
    NeverHandles,
}

impl Consumer {
    /// Declares the queue `demo` and starts to consume.
    pub(super) async fn start(broker: &Broker) -> anyhow::Result<Self> {
        // The user's own servers may still have the queue of an earlier demo, with messages in it.
        let deleted = broker.channel().await.queue_delete("demo".into(), QueueDeleteOptions::default()).await;
        deleted.context("could not delete the queue of an earlier demo")?;
        let mut arguments = FieldTable::default();
        // With this argument, rejected messages become dead letters, which are replayed. Without it they would be lost.
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
        let inbox = broker.inbox("tidings", "demo", &["#"], arguments).await;
        println!("a consumer waits at the queue demo, which is bound to the exchange tidings with #");
        println!(
            "it will reject the change to IN_PROGRESS {FAILURES} times, and the reminder 15 'minutes' ahead every time it arrives\n"
        );
        Ok(Self(inbox))
    }

    /// Receives messages until every announced one has arrived and been handled, or, if it is never handled, has
    /// arrived once. Fails if any other message arrives.
    pub(super) async fn receive(&mut self, announced: &Announced) -> anyhow::Result<()> {
        println!("\n{:<27} {:>11}   {:<18} body", "routing key", "lateness", "consumer");
        let (mut missing, mut latest) = (announced.clone(), 0);
        // How many times each message has arrived.
        let mut times = BTreeMap::new();
        while !missing.is_empty() {
            let Some(received) = self.0.next_within(EVENT_TIMEOUT).await else {
                let missing: Vec<String> = missing.into_values().collect();
                bail!(
                    "no message arrived for {} s, and these are missing: {}",
                    EVENT_TIMEOUT.as_secs(),
                    missing.join(", ")
                );
            };
            let (id, replay) = (received.id(), received.number("tidings-replay"));
            ensure!(announced.contains_key(&id), "a message arrived that was not announced: {}", received.text());
            let before = times.entry(id).or_insert(0);
            ensure!(
                replay == *before,
                "replay number {replay} arrived after {before} earlier arrivals: {}",
                received.text()
            );
            *before += 1;

            let answer = choose_answer(&received);
            let late = self.print_and_answer(&received, answer).await?;
            // Only first arrivals count, and not the message that had to wait for its plugin.
            if replay == 0 && received.delivery.routing_key.as_str() != "demo.hello" {
                latest = latest.max(late);
            }
            if !matches!(answer, Answer::Fails) {
                missing.remove(&id);
            }
        }
        println!(
            "\nall announced messages arrived, at most {latest} ms late (except the one that waited for its plugin), none early"
        );
        println!("the change to IN_PROGRESS was rejected {FAILURES} times and replayed until it was handled");
        Ok(())
    }

    /// Receives and acknowledges messages for ever.
    pub(super) async fn receive_for_ever(&mut self) -> anyhow::Result<()> {
        loop {
            let received = self.0.next_without_timeout().await;
            self.print_and_answer(&received, Answer::Handles).await?;
        }
    }

    /// Prints a message, acknowledges or rejects it, and returns its lateness in milliseconds.
    async fn print_and_answer(&self, received: &Received, answer: Answer) -> anyhow::Result<i64> {
        let late = received.at_ms - received.number("tidings-due-ms");
        ensure!(late >= 0, "a message arrived {} ms before it was due: {}", -late, received.text());
        let done = match answer {
            Answer::Handles => "handled",
            Answer::Fails | Answer::NeverHandles => "rejected",
        };
        let done = match received.number("tidings-replay") {
            0 => done.to_owned(),
            replay => format!("replay {replay}: {done}"),
        };
        println!("{:<27} {:>8} ms   {:<18} {}", received.headers()["tidings-routing-key"], late, done, received.text());
        match answer {
            Answer::Handles => {
                received.delivery.ack(BasicAckOptions::default()).await.context("could not acknowledge")?;
            }
            Answer::Fails | Answer::NeverHandles => self.0.reject(received).await,
        }
        Ok(late)
    }

    /// Fails if a dead letter is left.
    pub(super) async fn check_no_dead_letters(&self) -> anyhow::Result<()> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let dead = self.0.channel.queue_declare("tidings.dead".into(), options, FieldTable::default()).await;
        let letters = dead.context("could not look at tidings.dead")?.message_count();
        ensure!(letters == 0, "tidings.dead still has {letters} dead letters");
        println!("tidings.dead is empty");
        Ok(())
    }
}

/// Chooses what to do with a message.
fn choose_answer(received: &Received) -> Answer {
    let key = received.headers().remove("tidings-key").unwrap_or_default();
    if key.ends_with(" 15") {
        Answer::NeverHandles
    } else if key.ends_with(" IN_PROGRESS") && received.number("tidings-replay") < FAILURES {
        Answer::Fails
    } else {
        Answer::Handles
    }
}
