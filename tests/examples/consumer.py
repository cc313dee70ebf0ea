"""A complete consumer of Tidings' messages, in one file to copy.

- It acknowledges a message only after the message's effect is committed. If it is killed before that, RabbitMQ
  delivers the message again.
- It writes the message id in the same transaction as the effect, so a message that arrives twice has its effect once.
- It checks `tidings-expires-ms` before it does anything, because a message can expire after RabbitMQ has delivered it.
- It rejects a message that fails, and does not requeue it: the message then delays no other, and the daemon replays it
  from the dead letters.
- While the database is away it neither acknowledges nor rejects. It closes the connection to RabbitMQ, waits, and
  starts again.
- At SIGTERM and SIGINT it takes no further messages, finishes those it has begun, and exits with 0.

    pip install -r requirements.txt
    DATABASE_URL=postgres://… AMQP_URL=amqp://…?heartbeat=10 python3 consumer.py

Further variables, with their defaults: `QUEUE` (example), `BINDING` (#, all messages) and `EXCHANGE` (tidings, as for
the daemon).
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid

import aio_pika
import asyncpg

QUEUE = os.environ.get("QUEUE", "example")
BINDING = os.environ.get("BINDING", "#")
EXCHANGE = os.environ.get("EXCHANGE", "tidings")

# How many messages are handled at once. RabbitMQ keeps the others in the queue, for this or another consumer.
PREFETCH = 20
# How many seconds handling one message may take. Without a limit, a few handlers that hang would stop the queue, and
# the consumer could never stop.
MESSAGE_TIMEOUT = 30
# How many seconds to wait for an answer of a server.
ANSWER_TIMEOUT = 10

# The consumer's tables; in an application they belong to its migrations. A message goes into every queue that is bound
# to its routing key, so an id is unique only within a queue. Rows of consumer_handled may be deleted when no copy can
# arrive any more, for example after a month.
TABLES = """
    CREATE TABLE IF NOT EXISTS consumer_handled (
        queue text, message_id uuid, handled_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (queue, message_id));
    CREATE TABLE IF NOT EXISTS consumer_effects (
        message_id uuid NOT NULL, routing_key text NOT NULL, body jsonb NOT NULL, at timestamptz DEFAULT now())"""

# Prefixes of SQLSTATE codes for which the database and not the message is to blame: the connection broke, or the server
# shuts down, is full, is a standby, or rolled back the transaction over a deadlock. Any other error would occur again
# with the same message.
AWAY_SQLSTATES = ("08", "25006", "28", "3D", "40", "53", "57P", "58")


class DatabaseAway(Exception):
    """The message is neither acknowledged nor rejected, and the session starts again."""


async def main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # One connection for each message that is handled at once, so that no handler waits for another. Connections are
    # opened when they are needed.
    size = {"min_size": 0, "max_size": PREFETCH}
    db = await asyncpg.create_pool(
        os.environ["DATABASE_URL"], **size, timeout=ANSWER_TIMEOUT, command_timeout=MESSAGE_TIMEOUT
    )
    pause = 1
    while not stop.is_set():
        began = time.monotonic()
        try:
            await session(db, stop)
        except Exception as error:
            if time.monotonic() - began > 60:
                pause = 1
            first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            print(f"{first!r}; beginning again in {pause} s", file=sys.stderr, flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            pause = min(30, pause * 2)
    db.terminate()
    print("stopped", flush=True)


async def session(db: asyncpg.Pool, stop: asyncio.Event) -> None:
    """Consumes over one connection to RabbitMQ, until `stop` or an error. Unacknowledged messages are then requeued."""
    # The database comes first: while it is away, no message could be handled.
    await db.execute(TABLES, timeout=ANSWER_TIMEOUT)
    # Not connect_robust: it would reconnect silently and go on with messages that RabbitMQ has already requeued.
    async with await aio_pika.connect(os.environ["AMQP_URL"], timeout=ANSWER_TIMEOUT) as connection:
        channel = await connection.channel()
        # Declared with the same properties as by the daemon, so that either may start first.
        exchange = await channel.declare_exchange(EXCHANGE, "topic", durable=True, timeout=ANSWER_TIMEOUT)
        # Without this argument, rejected messages would be lost. The daemon owns the exchange for dead letters.
        arguments = {"x-dead-letter-exchange": f"{EXCHANGE}.dlx"}
        queue = await channel.declare_queue(QUEUE, durable=True, arguments=arguments, timeout=ANSWER_TIMEOUT)
        await queue.bind(exchange, BINDING, timeout=ANSWER_TIMEOUT)
        await channel.set_qos(PREFETCH, timeout=ANSWER_TIMEOUT)
        lost = asyncio.Event()
        channel.close_callbacks.add(lambda *_: lost.set())
        # When the queue is deleted, the channel stays open and no message would ever arrive.
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lambda _: lost.set())

        # An error in one task cancels the others: their transactions roll back, and RabbitMQ requeues the messages.
        async with asyncio.TaskGroup() as tasks:

            async def begin(message: aio_pika.abc.AbstractIncomingMessage) -> None:
                # A message that arrives while the consumer stops is requeued when the connection is closed.
                if not stop.is_set():
                    tasks.create_task(handle(db, message))

            async def watch() -> None:
                await lost.wait()
                raise ConnectionError("lost RabbitMQ, or it cancelled the consumer")

            watching = tasks.create_task(watch())
            consumer = await queue.consume(begin, timeout=ANSWER_TIMEOUT)
            print("ready", flush=True)
            await stop.wait()
            await queue.cancel(consumer, timeout=ANSWER_TIMEOUT)
            watching.cancel()


async def handle(db: asyncpg.Pool, message: aio_pika.abc.AbstractIncomingMessage) -> None:
    """Handles one message: acknowledges it after its transaction, or rejects it after an error."""
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT):
            outcome = await process(db, message)
    except DatabaseAway:
        raise
    except Exception as error:
        if isinstance(error, TimeoutError):
            # The message is to blame only if the database answers.
            await reach_database()
        print(f"rejected {message.message_id or '-'}: {error!r}", flush=True)
        await message.nack(requeue=False)
    else:
        print(outcome, flush=True)
        await message.ack()


async def reach_database() -> None:
    """Connects to the database, outside of the pool: the pool's connections may be hanging."""
    try:
        connection = await asyncpg.connect(os.environ["DATABASE_URL"], timeout=ANSWER_TIMEOUT)
    except Exception as error:
        raise DatabaseAway(repr(error)) from error
    connection.terminate()


async def process(db: asyncpg.Pool, message: aio_pika.abc.AbstractIncomingMessage) -> str:
    """Runs the transaction of one message, and returns the line to print. Any exception rolls it back."""
    # A message without a UUID is not from Tidings, and a second copy could not be recognised. It becomes a dead letter.
    id = uuid.UUID(message.message_id or "")
    expires_ms = message.headers.get("tidings-expires-ms")
    if expires_ms is not None and type(expires_ms) is not int:
        raise ValueError(f"tidings-expires-ms is not an integer: {expires_ms!r}")
    # A replay is published directly to the queue, so its routing key is the queue's name. The header has the original.
    key = message.headers.get("tidings-routing-key", message.routing_key)
    try:
        connection = await db.acquire(timeout=ANSWER_TIMEOUT)
    except Exception as error:
        raise DatabaseAway(repr(error)) from error
    try:
        async with connection.transaction():
            # Compared with the database clock, by which the deadline was set: the clock of this machine may be wrong.
            stale = "SELECT $1 <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
            if expires_ms is not None and await connection.fetchval(stale, expires_ms):
                return f"stale {id}"
            # If another consumer is handling the same message, this waits for the end of that transaction.
            new = "INSERT INTO consumer_handled (queue, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
            if await connection.execute(new, QUEUE, id) == "INSERT 0 0":
                return f"duplicate {id}"
            await effect(connection, id, key, message.body)
        return f"handled {id} {key}"
    except Exception as error:
        if broke(connection) or (getattr(error, "sqlstate", None) or "").startswith(AWAY_SQLSTATES):
            raise DatabaseAway(repr(error)) from error
        raise
    finally:
        # If releasing fails, the pool drops the connection. The commit is not affected.
        with contextlib.suppress(Exception):
            await db.release(connection, timeout=ANSWER_TIMEOUT)


def broke(connection: asyncpg.pool.PoolConnectionProxy) -> bool:
    """Whether the connection is lost. The pool may already have taken back a lost connection."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


async def effect(connection: asyncpg.Connection, id: uuid.UUID, key: str, body: bytes) -> None:
    """Put your own work here. Effects outside of the transaction, such as an email, may happen twice."""
    text = body.decode()
    parsed = json.loads(text)
    if isinstance(parsed, dict) and parsed.get("fail") is True:
        raise RuntimeError("the body says fail")
    insert = "INSERT INTO consumer_effects (message_id, routing_key, body) VALUES ($1, $2, $3::text::jsonb)"
    await connection.execute(insert, id, key, text)


if __name__ == "__main__":
    asyncio.run(main())
