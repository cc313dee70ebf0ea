//! An intake as one more producer: a process that publishes messages to an exchange, and writes to a file which of them RabbitMQ has
//! confirmed. A trigger writes each row of an intake to the ledger, so that its message is judged as that of any row. Here it is
//! judged whether each confirmed message became a row.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};
use sqlx::Executor as _;
use sqlx::postgres::PgPool;
use uuid::Uuid;

use crate::addresses::Nodes;
use crate::consumer::ROUTING_KEY;
use crate::nemesis::now_ms;
use crate::random::Random;

/// The setting of the daemons: what is published to `rig.delayed` goes to the exchange of all messages.
pub(crate) const SETTING: &str = "rig.delayed=tidings";
/// The queue of the intake.
pub(crate) const QUEUE: &str = "tidings.intake.rig.delayed";
/// The exchange to which messages are published.
const FROM: &str = "rig.delayed";

/// Part of the ledger. A row is known by the id of its message. A second row of one message would show as a second copy.
const LEDGER: &str = "
    CREATE FUNCTION rig.note_relayed() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO rig.scheduled VALUES (NEW.key::uuid, NEW.due_at, NEW.expires_at) ON CONFLICT DO NOTHING;
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER note_relayed AFTER INSERT ON tidings.schedules
        FOR EACH ROW WHEN (NEW.kind = 'relay') EXECUTE FUNCTION rig.note_relayed()";

/// Prepares the ledger.
pub(crate) async fn start(db: &PgPool) -> anyhow::Result<()> {
    db.execute(LEDGER).await?;
    Ok(())
}

/// Publishes about `rate` messages a second for `seconds`, and continues after every failure of RabbitMQ. The ids of those that
/// were confirmed go into `file`.
pub(crate) async fn publish(url: &str, seed: u64, seconds: u64, rate: u64, file: &Path) -> anyhow::Result<()> {
    let mut random = Random::new(seed ^ 0x6963);
    let mut file = OpenOptions::new().create(true).append(true).open(file).context("the file of confirmed messages")?;
    let begun = Instant::now();
    let (nodes, mut channel, mut published) = (Nodes::of(url, seed), None, 0_u64);
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    while begun.elapsed() < Duration::from_secs(seconds) {
        pace.tick().await;
        let wanted = begun.elapsed().as_millis() * u128::from(rate) / 1000;
        let count = u64::try_from(wanted).unwrap_or(u64::MAX).saturating_sub(published).min(200);
        published += count;
        if count == 0 {
            continue;
        }
        let batch = tokio::time::timeout(
            Duration::from_secs(10),
            publish_batch(&mut channel, &nodes, &mut random, count, &mut file),
        );
        if !matches!(batch.await, Ok(Ok(()))) {
            channel = None;
        }
    }
    Ok(())
}

/// Publishes so many messages, and writes the ids of those that are confirmed.
async fn publish_batch(
    channel: &mut Option<Channel>,
    nodes: &Nodes,
    random: &mut Random,
    count: u64,
    file: &mut File,
) -> anyhow::Result<()> {
    if channel.is_none() {
        let opened = nodes.connect().await?.create_channel().await?;
        opened.confirm_select(ConfirmSelectOptions::default()).await?;
        *channel = Some(opened);
    }
    let open = channel.as_ref().expect("it is open");
    let mut confirms = Vec::new();
    for _ in 0..count {
        let id = Uuid::new_v4();
        let mut headers = FieldTable::default();
        let delay = i64::try_from(random.below(5_000))?;
        headers.insert("x-delay".into(), AMQPValue::LongLongInt(delay));
        let mut properties = BasicProperties::default()
            .with_message_id(id.to_string().into())
            .with_delivery_mode(2)
            .with_headers(headers);
        // RabbitMQ counts it in the intake's queue as well, so it is longer than a fault.
        if random.below(5) == 0 {
            properties = properties.with_expiration((120_000 + random.below(10_000)).to_string().into());
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        confirms.push((id, open.basic_publish(FROM.into(), ROUTING_KEY.into(), options, b"rig", properties).await?));
    }
    for (id, confirm) in confirms {
        if matches!(confirm.await?, Confirmation::Ack(None)) {
            writeln!(file, "{id} {}", now_ms())?;
        }
    }
    Ok(())
}

/// How many messages were confirmed, and those of them that never became a row, each with the time of its confirm in ms since the Unix
/// epoch.
pub(crate) async fn judge(db: &PgPool, file: &Path) -> anyhow::Result<(usize, Vec<(Uuid, i64)>)> {
    let text = std::fs::read_to_string(file).context("the file of confirmed messages")?;
    let parse = |line: &str| {
        let (id, at_ms) = line.split_once(' ').context("an id and a time")?;
        Ok((id.parse()?, at_ms.parse()?))
    };
    let confirmed: Vec<(Uuid, i64)> = text.lines().map(parse).collect::<anyhow::Result<_>>()?;
    let written: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM rig.scheduled").fetch_all(db).await?;
    let written: HashSet<Uuid> = written.into_iter().collect();
    let lost = confirmed.iter().filter(|(id, _)| !written.contains(id)).copied().collect();
    Ok((confirmed.len(), lost))
}
