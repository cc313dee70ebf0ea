//! A consumer of Tidings' messages, done right, in one file to copy.
//!
//! - A message is acknowledged only after its effect is committed. Killed before that, the consumer gets it again.
//! - Its id is written in the same transaction as the effect. A message that comes twice has its effect once.
//! - `tidings-expires-ms` is looked at once more before anything is done: nobody can recall a message that is here.
//! - What fails is rejected, not put back: it delays no other, and the daemon replays it from the dead letters.
//! - While the database is away, nothing is acknowledged or rejected. The consumer hangs up, waits, and begins again.
//! - At SIGTERM and SIGINT it takes no more, finishes what it has begun, and exits with 0.
//!
//! `DATABASE_URL=postgres://… AMQP_URL=amqp://…?heartbeat=10 cargo run --package tidings-tests --example consumer`
//!
//! Also read: `QUEUE` (example), `BINDING` (#, which is everything) and `EXCHANGE` (tidings, the daemon's).

use std::env;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use futures_util::future::{BoxFuture, FutureExt as _, Shared};
use futures_util::stream::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

/// How many messages are worked on at once. The broker holds the others back, for us or for another consumer.
const PREFETCH: u16 = 20;
/// How long one message may take. Without a limit, a few that hang would stop the queue, and a stop would never end.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// In an application these belong to its migrations. A message goes into every queue that is bound to its key, so an id
/// counts once in each. Rows may be deleted when no copy can come any more: after a month, say.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS consumer_handled (
        queue text, message_id uuid, handled_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (queue, message_id));
    CREATE TABLE IF NOT EXISTS consumer_effects (
        message_id uuid NOT NULL, routing_key text NOT NULL, body jsonb NOT NULL, at timestamptz DEFAULT now())";

type Stop = Shared<BoxFuture<'static, ()>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let urls = (env::var("DATABASE_URL").context("DATABASE_URL")?, env::var("AMQP_URL").context("AMQP_URL")?);
    // A connection for each message at work, so that none waits for another's.
    let options = PgPoolOptions::new().max_connections(PREFETCH.into()).acquire_timeout(PATIENCE);
    // The server ends what hangs as well: a connection that waits for its answer is of no use to the next message.
    let limit = [("statement_timeout", format!("{}s", DEADLINE.as_secs()))];
    let db = options.connect_lazy_with(urls.0.parse::<PgConnectOptions>().context("DATABASE_URL")?.options(limit));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move { tokio::select!( _ = terminate.recv() => (), _ = interrupt.recv() => () ) }.boxed().shared();

    let mut pause = 1;
    while let Err(error) = session(&db, &urls.1, &stop, &mut pause).await {
        eprintln!("{error:#}; beginning again in {pause} s");
        if timeout(Duration::from_secs(pause), stop.clone()).await.is_ok() {
            break;
        }
        pause = (pause * 2).min(30);
    }
    println!("stopped");
    Ok(())
}

/// One connection to the broker, until `stop` or until something breaks. What was not acknowledged then comes again.
async fn session(db: &PgPool, url: &str, stop: &Stop, pause: &mut u64) -> anyhow::Result<()> {
    let connect = async {
        // First: while the database is away there is no use in taking messages.
        sqlx::raw_sql(TABLES).execute(db).await.context("the database cannot be used")?;
        Connection::connect(url, ConnectionProperties::default()).await.context("RabbitMQ cannot be used")
    };
    let connection = tokio::select! {
        () = stop.clone() => return Ok(()),
        connected = timeout(PATIENCE, connect) => connected.context("no answer while connecting")??,
    };
    let result = consume(&connection, db, stop, pause).await;
    // After an error as well: the broker keeps what is not acknowledged for a connection as long as it believes in it.
    let closed = timeout(PATIENCE, connection.close(200, "good-bye".into())).await;
    result?;
    closed.context("no answer to good-bye")?.context("could not say good-bye")
}

async fn consume(connection: &Connection, db: &PgPool, stop: &Stop, pause: &mut u64) -> anyhow::Result<()> {
    let setting = |name, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    let (queue, key, exchange) = (setting("QUEUE", "example"), setting("BINDING", "#"), setting("EXCHANGE", "tidings"));
    let (name, none) = (|| queue.as_str().into(), FieldTable::default);
    let channel = connection.create_channel().await?;
    // As the daemon declares it, so that it does not matter who comes first.
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, none()).await?;
    // Without these, what is rejected would be lost. The exchange for dead letters is the daemon's.
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString(format!("{exchange}.dlx").into()));
    channel.queue_declare(name(), QueueDeclareOptions::durable(), arguments).await?;
    channel.queue_bind(name(), exchange.into(), key.into(), QueueBindOptions::default(), none()).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut messages = channel.basic_consume(name(), "".into(), BasicConsumeOptions::default(), none()).await?;
    println!("ready");

    // Dropped after an error, it aborts what is at work: those transactions roll back, and the messages come again.
    let mut handlers = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.clone() => break,
            Some(handled) = handlers.join_next() => { handled??; *pause = 1; }
            message = messages.next() => {
                let message = message.context("RabbitMQ cancelled the consumer")?.context("lost RabbitMQ")?;
                handlers.spawn(handle(db.clone(), queue.clone(), message));
            }
        }
    }
    // What the broker has sent and we have not begun goes back into the queue when the connection is closed.
    let cancelled = channel.basic_cancel(messages.tag(), BasicCancelOptions::default());
    timeout(PATIENCE, cancelled).await.context("RabbitMQ does not answer")??;
    while let Some(handled) = handlers.join_next().await {
        handled??;
    }
    Ok(())
}

/// One message, to its end. An error means that the broker was told nothing, and that everything begins again.
async fn handle(db: PgPool, queue: String, message: Delivery) -> anyhow::Result<()> {
    // A panic ends as a rejection too: a message that is never settled would take up a place for ever.
    let work = AssertUnwindSafe(process(&db, &queue, &message)).catch_unwind();
    let done = match timeout(DEADLINE, work).await {
        Ok(done) => done.unwrap_or_else(|_| Err(anyhow!("the handler panicked"))),
        // Its own fault only if the database answers.
        Err(_) => Err(db.acquire().await.map_or_else(Into::into, |_| anyhow!("it took longer than {DEADLINE:?}"))),
    };
    let told = match done {
        Ok(outcome) => {
            println!("{outcome}");
            message.ack(BasicAckOptions::default()).await?
        }
        Err(error) if database_is_away(&error) => return Err(error.context("the database is away")),
        Err(error) => {
            println!("rejected {}: {error:#}", message.properties.message_id().as_ref().map_or("-", |id| id.as_str()));
            message.nack(BasicNackOptions { requeue: false, multiple: false }).await?
        }
    };
    ensure!(told, "lost RabbitMQ");
    Ok(())
}

/// The transaction: whatever leaves it before the commit rolls it back. Returns what to print.
async fn process(db: &PgPool, queue: &str, message: &Delivery) -> anyhow::Result<String> {
    let header = |name: &str| message.properties.headers().as_ref().and_then(|headers| headers.inner().get(name));
    // Without an id it is not from Tidings, and a copy of it could not be told. The dead letters are there to look at.
    let id = message.properties.message_id().as_ref().and_then(|id| id.as_str().parse::<Uuid>().ok());
    let id = id.context("its message_id is not a UUID")?;
    let mut transaction = db.begin().await?;
    if let Some(expires_ms) = header("tidings-expires-ms") {
        let AMQPValue::LongLongInt(expires_ms) = expires_ms else { bail!("its deadline is {expires_ms:?}") };
        // By the clock of the database, which made the deadline: ours may be wrong.
        let stale = "SELECT $1 <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        if sqlx::query_scalar(stale).bind(expires_ms).fetch_one(&mut *transaction).await? {
            return Ok(format!("stale {id}"));
        }
    }
    // Where another consumer has the same message at work, this waits until that one has committed or rolled back.
    let new = "INSERT INTO consumer_handled (queue, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    if sqlx::query(new).bind(queue).bind(id).execute(&mut *transaction).await?.rows_affected() == 0 {
        return Ok(format!("duplicate {id}"));
    }
    // A replayed letter comes straight into the queue, and its own routing key is then the queue's name.
    let key = match header("tidings-routing-key") {
        Some(AMQPValue::LongString(key)) => key.to_string(),
        _ => message.routing_key.to_string(),
    };
    effect(&mut transaction, id, &key, &message.data).await?;
    transaction.commit().await?;
    Ok(format!("handled {id} {key}"))
}

/// Yours goes here. What it does outside of the transaction, a mail for instance, may happen twice.
async fn effect(transaction: &mut PgConnection, id: Uuid, key: &str, body: &[u8]) -> anyhow::Result<()> {
    let parsed: serde_json::Value = serde_json::from_slice(body).context("the body is not JSON")?;
    ensure!(parsed["fail"] != true, "the body says fail");
    let insert = "INSERT INTO consumer_effects (message_id, routing_key, body) VALUES ($1, $2, $3::text::jsonb)";
    sqlx::query(insert).bind(id).bind(key).bind(str::from_utf8(body)?).execute(transaction).await?;
    Ok(())
}

/// Whether the message is not to blame: the connection broke, or the server shuts down, is full, is a replica, or chose
/// a victim. Any other error would only come again.
fn database_is_away(error: &anyhow::Error) -> bool {
    let codes = ["08", "25006", "28", "3D", "40", "53", "57P", "58"];
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(sqlx::Error::Database(e)) => e.code().is_some_and(|code| codes.iter().any(|it| code.starts_with(it))),
        Some(sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut) => true,
        _ => false,
    })
}
