//! A complete consumer of Tidings' messages, in one file to copy.
//!
//! - It acknowledges a message only after the message's effect is committed. If it is killed before that, RabbitMQ
//!   delivers the message again.
//! - It writes the message id in the same transaction as the effect, so a message that arrives twice has its effect
//!   once.
//! - It checks `tidings-expires-ms` before it does anything, because a message can expire after RabbitMQ has delivered
//!   it.
//! - It rejects a message that fails, and does not requeue it: the message then delays no other, and the daemon replays
//!   it from the dead letters.
//! - While the database is away it neither acknowledges nor rejects. It closes the connection to RabbitMQ, waits, and
//!   starts again.
//! - At SIGTERM and SIGINT it takes no further messages, finishes those it has begun, and exits with 0.
//!
//! `DATABASE_URL=postgres://… AMQP_URL=amqp://…?heartbeat=10 cargo run --package tidings-tests --example consumer`
//!
//! Further variables, with their defaults: `QUEUE` (example), `BINDING` (#, all messages) and `EXCHANGE` (tidings, as
//! for the daemon).

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

/// How many messages are handled at once. RabbitMQ keeps the others in the queue, for this or another consumer.
const PREFETCH: u16 = 20;
/// How long handling one message may take. Without a limit, a few handlers that hang would stop the queue, and the
/// consumer could never stop.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for an answer of a server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The consumer's tables; in an application they belong to its migrations. A message goes into every queue that is
/// bound to its routing key, so an id is unique only within a queue. Rows of `consumer_handled` may be deleted when no
/// copy can arrive any more, for example after a month.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS consumer_handled (
        queue text, message_id uuid, handled_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (queue, message_id));
    CREATE TABLE IF NOT EXISTS consumer_effects (
        message_id uuid NOT NULL, routing_key text NOT NULL, body jsonb NOT NULL, at timestamptz DEFAULT now())";

type Stop = Shared<BoxFuture<'static, ()>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let urls = (env::var("DATABASE_URL").context("DATABASE_URL")?, env::var("AMQP_URL").context("AMQP_URL")?);
    // One connection for each message that is handled at once, so that no handler waits for another.
    let options = PgPoolOptions::new().max_connections(PREFETCH.into()).acquire_timeout(ANSWER_TIMEOUT);
    // PostgreSQL ends a statement that hangs as well. Otherwise its connection could not be used for the next message.
    let limit = [("statement_timeout", format!("{}s", MESSAGE_TIMEOUT.as_secs()))];
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

/// Consumes over one connection to RabbitMQ, until `stop` or until an error. RabbitMQ then delivers again what was not
/// acknowledged.
async fn session(db: &PgPool, url: &str, stop: &Stop, pause: &mut u64) -> anyhow::Result<()> {
    let connect = async {
        // The database comes first: while it is away, no message could be handled.
        sqlx::raw_sql(TABLES).execute(db).await.context("the database cannot be used")?;
        Connection::connect(url, ConnectionProperties::default()).await.context("RabbitMQ cannot be used")
    };
    let connection = tokio::select! {
        () = stop.clone() => return Ok(()),
        connected = timeout(ANSWER_TIMEOUT, connect) => connected.context("no answer while connecting")??,
    };
    let result = consume(&connection, db, stop, pause).await;
    // Also after an error: RabbitMQ requeues unacknowledged messages only when it knows that the connection is closed.
    let closed = timeout(ANSWER_TIMEOUT, connection.close(200, "the consumer stops or starts again".into())).await;
    result?;
    closed.context("RabbitMQ did not answer when the connection was closed")?.context("could not close the connection")
}

async fn consume(connection: &Connection, db: &PgPool, stop: &Stop, pause: &mut u64) -> anyhow::Result<()> {
    let setting = |name, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    let (queue, key, exchange) = (setting("QUEUE", "example"), setting("BINDING", "#"), setting("EXCHANGE", "tidings"));
    let (name, none) = (|| queue.as_str().into(), FieldTable::default);
    let channel = connection.create_channel().await?;
    // Declared with the same properties as by the daemon, so that either may start first.
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, none()).await?;
    // Without this argument, rejected messages would be lost. The daemon owns the exchange for dead letters.
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString(format!("{exchange}.dlx").into()));
    channel.queue_declare(name(), QueueDeclareOptions::durable(), arguments).await?;
    channel.queue_bind(name(), exchange.into(), key.into(), QueueBindOptions::default(), none()).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let mut messages = channel.basic_consume(name(), "".into(), BasicConsumeOptions::default(), none()).await?;
    println!("ready");

    // After an error, dropping this set aborts the handlers: their transactions roll back, and RabbitMQ delivers the
    // messages again.
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
    // Messages that RabbitMQ has sent and no handler has begun go back into the queue when the channel is closed.
    let cancelled = channel.basic_cancel(messages.tag(), BasicCancelOptions::default());
    timeout(ANSWER_TIMEOUT, cancelled).await.context("RabbitMQ does not answer")??;
    while let Some(handled) = handlers.join_next().await {
        handled??;
    }
    // lapin would close the channel when it is dropped, but without waiting: the connection could then not be closed in
    // order, and the last acknowledgements could be lost.
    let closed = channel.close(200, "the consumer stops".into());
    timeout(ANSWER_TIMEOUT, closed).await.context("RabbitMQ did not answer when the channel was closed")??;
    Ok(())
}

/// Handles one message. An error means that the message was neither acknowledged nor rejected, and that the session
/// must start again.
async fn handle(db: PgPool, queue: String, message: Delivery) -> anyhow::Result<()> {
    // A panic also rejects the message. A message that is neither acknowledged nor rejected would occupy a place of
    // PREFETCH for ever.
    let work = AssertUnwindSafe(process(&db, &queue, &message)).catch_unwind();
    let done = match timeout(MESSAGE_TIMEOUT, work).await {
        Ok(done) => done.unwrap_or_else(|_| Err(anyhow!("the handler panicked"))),
        // The message is to blame only if the database answers.
        Err(_) => {
            Err(db.acquire().await.map_or_else(Into::into, |_| anyhow!("it took longer than {MESSAGE_TIMEOUT:?}")))
        }
    };
    let answered = match done {
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
    ensure!(answered, "lost RabbitMQ");
    Ok(())
}

/// Runs the transaction of one message, and returns the line to print. Every return before the commit rolls it back.
async fn process(db: &PgPool, queue: &str, message: &Delivery) -> anyhow::Result<String> {
    let header = |name: &str| message.properties.headers().as_ref().and_then(|headers| headers.inner().get(name));
    // A message without a UUID is not from Tidings, and a second copy could not be recognised. It becomes a dead
    // letter.
    let id = message.properties.message_id().as_ref().and_then(|id| id.as_str().parse::<Uuid>().ok());
    let id = id.context("its message_id is not a UUID")?;
    let mut transaction = db.begin().await?;
    if let Some(expires_ms) = header("tidings-expires-ms") {
        let AMQPValue::LongLongInt(expires_ms) = expires_ms else {
            bail!("tidings-expires-ms is not an integer: {expires_ms:?}")
        };
        // Compared with the database clock, by which the deadline was set: the clock of this machine may be wrong.
        let stale = "SELECT $1 <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        if sqlx::query_scalar(stale).bind(expires_ms).fetch_one(&mut *transaction).await? {
            return Ok(format!("stale {id}"));
        }
    }
    // If another consumer is handling the same message, this waits until that transaction is committed or rolled back.
    let new = "INSERT INTO consumer_handled (queue, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    if sqlx::query(new).bind(queue).bind(id).execute(&mut *transaction).await?.rows_affected() == 0 {
        return Ok(format!("duplicate {id}"));
    }
    // A replay is published directly to the queue, so its routing key is the queue's name. The header has the original
    // key.
    let key = match header("tidings-routing-key") {
        Some(AMQPValue::LongString(key)) => key.to_string(),
        _ => message.routing_key.to_string(),
    };
    effect(&mut transaction, id, &key, &message.data).await?;
    transaction.commit().await?;
    Ok(format!("handled {id} {key}"))
}

/// Put your own work here. Effects outside of the transaction, such as an email, may happen twice.
async fn effect(transaction: &mut PgConnection, id: Uuid, key: &str, body: &[u8]) -> anyhow::Result<()> {
    let parsed: serde_json::Value = serde_json::from_slice(body).context("the body is not JSON")?;
    ensure!(parsed["fail"] != true, "the body says fail");
    let insert = "INSERT INTO consumer_effects (message_id, routing_key, body) VALUES ($1, $2, $3::text::jsonb)";
    sqlx::query(insert).bind(id).bind(key).bind(str::from_utf8(body)?).execute(transaction).await?;
    Ok(())
}

/// Whether the database and not the message is to blame: the connection broke, or the server shuts down, is full, is a
/// standby, or rolled back the transaction over a deadlock. Any other error would occur again with the same message.
fn database_is_away(error: &anyhow::Error) -> bool {
    let codes = ["08", "25006", "28", "3D", "40", "53", "57P", "58"];
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(sqlx::Error::Database(e)) => e.code().is_some_and(|code| codes.iter().any(|it| code.starts_with(it))),
        Some(sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut) => true,
        _ => false,
    })
}
