//! The consumer of the demo: prints what it receives, with its lateness, and fails now and then, as consumers do.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use lapin::options::{BasicAckOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use testkit::PATIENCE;
use testkit::consumer::{Broker, Inbox, Received};

use crate::Announced;

/// How often it fails at the start of the game before it succeeds.
const FAILURES: i64 = 2;

/// The consumer, at its queue.
pub(super) struct Consumer(Inbox);

/// What it does with a message.
#[derive(Clone, Copy)]
enum Answer {
    /// Acknowledges it.
    Handles,
    /// Rejects it, for now.
    Fails,
    /// Rejects it, whenever it comes.
    NeverHandles,
}

impl Consumer {
    /// Declares the queue `demo`, and begins to consume.
    pub(super) async fn begin(broker: &Broker) -> anyhow::Result<Self> {
        // Servers that are not ours may have one of an earlier demo, with messages in it.
        let deleted = broker.channel().await.queue_delete("demo".into(), QueueDeleteOptions::default()).await;
        deleted.context("could not delete the queue of an earlier demo")?;
        let mut arguments = FieldTable::default();
        // With this, what it rejects is replayed and not lost.
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
        let inbox = broker.inbox("tidings", "demo", &["#"], arguments).await;
        println!("a consumer waits at the queue demo, bound to the exchange tidings with #");
        println!(
            "it will fail {FAILURES} times at the change to IN_PROGRESS, and at the reminder 15 'minutes' ahead whenever it comes\n"
        );
        Ok(Self(inbox))
    }

    /// Receives until all that is announced has come, and is handled if it can be. Anything else must not come.
    pub(super) async fn receive(&mut self, announced: &Announced) -> anyhow::Result<()> {
        println!("\n{:<27} {:>11}   {:<18} body", "routing key", "lateness", "consumer");
        let (mut missing, mut latest) = (announced.clone(), 0);
        // How often each has come.
        let mut times = BTreeMap::new();
        while !missing.is_empty() {
            let Some(received) = self.0.within(PATIENCE).await else {
                let missing: Vec<String> = missing.into_values().collect();
                bail!("nothing came for {} s, and these are missing: {}", PATIENCE.as_secs(), missing.join(", "));
            };
            let (id, replay) = (received.id(), received.number("tidings-replay"));
            ensure!(announced.contains_key(&id), "a message came that was not announced: {}", received.text());
            let before = times.entry(id).or_insert(0);
            ensure!(replay == *before, "replay {replay} came after {before} others: {}", received.text());
            *before += 1;

            let answer = answer(&received);
            let late = self.show(&received, answer).await?;
            // The others had to wait: for their plugin, or for the next pass over the dead letters.
            if replay == 0 && received.delivery.routing_key.as_str() != "demo.hello" {
                latest = latest.max(late);
            }
            if !matches!(answer, Answer::Fails) {
                missing.remove(&id);
            }
        }
        println!(
            "\neverything that was announced arrived, {latest} ms late at most (but the one that waited for its plugin), none early"
        );
        println!("the change to IN_PROGRESS was rejected {FAILURES} times, and replayed until it was handled");
        Ok(())
    }

    /// Receives for ever, and handles everything.
    pub(super) async fn go_on(&mut self) -> anyhow::Result<()> {
        loop {
            let received = self.0.next_or_never().await;
            self.show(&received, Answer::Handles).await?;
        }
    }

    /// Prints a message and answers it; returns its lateness in milliseconds.
    async fn show(&self, received: &Received, answer: Answer) -> anyhow::Result<i64> {
        let late = received.at_ms - received.number("tidings-due-ms");
        ensure!(late >= 0, "a message came {} ms before it was due: {}", -late, received.text());
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

    /// Nothing that was rejected is left.
    pub(super) async fn no_letter_is_dead(&self) -> anyhow::Result<()> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let dead = self.0.channel.queue_declare("tidings.dead".into(), options, FieldTable::default()).await;
        let letters = dead.context("could not look at tidings.dead")?.message_count();
        ensure!(letters == 0, "tidings.dead has {letters} letters");
        println!("tidings.dead is empty");
        Ok(())
    }
}

/// What it does with a message of the games.
fn answer(received: &Received) -> Answer {
    let key = received.headers().remove("tidings-key").unwrap_or_default();
    if key.ends_with(" 15") {
        Answer::NeverHandles
    } else if key.ends_with(" IN_PROGRESS") && received.number("tidings-replay") < FAILURES {
        Answer::Fails
    } else {
        Answer::Handles
    }
}
