"""A consumer of Tidings' messages, done right, in one file to copy.

- A message is acknowledged only after its effect is committed. Killed before that, the consumer gets it again.
- Its id is written in the same transaction as the effect. A message that comes twice has its effect once.
- `tidings-expires-ms` is looked at once more before anything is done: nobody can recall a message that is here.
- What fails is rejected, not put back: it delays no other, and the daemon replays it from the dead letters.
- While the database is away, nothing is acknowledged or rejected. The consumer hangs up, waits, and begins again.
- At SIGTERM and SIGINT it takes no more, finishes what it has begun, and exits with 0.

    pip install -r requirements.txt
    DATABASE_URL=postgres://… AMQP_URL=amqp://…?heartbeat=10 python3 consumer.py

Also read: `QUEUE` (example), `BINDING` (#, which is everything) and `EXCHANGE` (tidings, the daemon's).
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

# How many messages are worked on at once. The broker holds the others back, for us or for another consumer.
PREFETCH = 20
# How many seconds one message may take. Without a limit, a few that hang would stop the queue, and a stop would never
# end.
DEADLINE = 30
# How many seconds a server may take to answer.
PATIENCE = 10

# In an application these belong to its migrations. A message goes into every queue that is bound to its key, so an id
# counts once in each. Rows may be deleted when no copy can come any more: after a month, say.
TABLES = """
    CREATE TABLE IF NOT EXISTS consumer_handled (
        queue text, message_id uuid, handled_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (queue, message_id));
    CREATE TABLE IF NOT EXISTS consumer_effects (
        message_id uuid NOT NULL, routing_key text NOT NULL, body jsonb NOT NULL, at timestamptz DEFAULT now())"""

# What the server says when the message is not to blame: the connection broke, or the server shuts down, is full, is a
# replica, or chose a victim. Any other error would only come again.
AWAY = ("08", "25006", "28", "3D", "40", "53", "57P", "58")


class DatabaseAway(Exception):
    """The broker is told nothing, and everything begins again."""


async def main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # A connection for each message at work, so that none waits for another's. The first is made when it is needed.
    size = {"min_size": 0, "max_size": PREFETCH}
    db = await asyncpg.create_pool(os.environ["DATABASE_URL"], **size, timeout=PATIENCE, command_timeout=DEADLINE)
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
    """One connection to the broker, until `stop` or until something breaks. What is not acknowledged comes again."""
    # First: while the database is away there is no use in taking messages.
    await db.execute(TABLES, timeout=PATIENCE)
    # Not connect_robust: it would go on as if nothing had happened, with messages that are no longer ours.
    async with await aio_pika.connect(os.environ["AMQP_URL"], timeout=PATIENCE) as connection:
        channel = await connection.channel()
        # As the daemon declares it, so that it does not matter who comes first.
        exchange = await channel.declare_exchange(EXCHANGE, "topic", durable=True, timeout=PATIENCE)
        # Without these, what is rejected would be lost. The exchange for dead letters is the daemon's.
        arguments = {"x-dead-letter-exchange": f"{EXCHANGE}.dlx"}
        queue = await channel.declare_queue(QUEUE, durable=True, arguments=arguments, timeout=PATIENCE)
        await queue.bind(exchange, BINDING, timeout=PATIENCE)
        await channel.set_qos(PREFETCH, timeout=PATIENCE)
        lost = asyncio.Event()
        channel.close_callbacks.add(lambda *_: lost.set())
        # When the queue is deleted, the channel stays open, and nothing would ever come.
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lambda _: lost.set())

        # An error in one task cancels the others: those transactions roll back, and the messages come again.
        async with asyncio.TaskGroup() as tasks:

            async def begin(message: aio_pika.abc.AbstractIncomingMessage) -> None:
                # What comes while we stop goes back into the queue when the connection is closed.
                if not stop.is_set():
                    tasks.create_task(handle(db, message))

            async def watch() -> None:
                await lost.wait()
                raise ConnectionError("lost RabbitMQ, or it cancelled the consumer")

            watching = tasks.create_task(watch())
            consumer = await queue.consume(begin, timeout=PATIENCE)
            print("ready", flush=True)
            await stop.wait()
            await queue.cancel(consumer, timeout=PATIENCE)
            watching.cancel()


async def handle(db: asyncpg.Pool, message: aio_pika.abc.AbstractIncomingMessage) -> None:
    """One message, to its end."""
    try:
        async with asyncio.timeout(DEADLINE):
            outcome = await process(db, message)
    except DatabaseAway:
        raise
    except Exception as error:
        if isinstance(error, TimeoutError):
            # Its own fault only if the database answers.
            await reach_database()
        print(f"rejected {message.message_id or '-'}: {error!r}", flush=True)
        await message.nack(requeue=False)
    else:
        print(outcome, flush=True)
        await message.ack()


async def reach_database() -> None:
    """With a connection of its own: those of the pool may be what hangs."""
    try:
        connection = await asyncpg.connect(os.environ["DATABASE_URL"], timeout=PATIENCE)
    except Exception as error:
        raise DatabaseAway(repr(error)) from error
    connection.terminate()


async def process(db: asyncpg.Pool, message: aio_pika.abc.AbstractIncomingMessage) -> str:
    """The transaction: whatever raises before its end rolls it back. Returns what to print."""
    # Without an id it is not from Tidings, and a copy of it could not be told. The dead letters are there to look at.
    id = uuid.UUID(message.message_id or "")
    expires_ms = message.headers.get("tidings-expires-ms")
    if expires_ms is not None and type(expires_ms) is not int:
        raise ValueError(f"its deadline is {expires_ms!r}")
    # A replayed letter comes straight into the queue, and its own routing key is then the queue's name.
    key = message.headers.get("tidings-routing-key", message.routing_key)
    try:
        connection = await db.acquire(timeout=PATIENCE)
    except Exception as error:
        raise DatabaseAway(repr(error)) from error
    try:
        async with connection.transaction():
            # By the clock of the database, which made the deadline: ours may be wrong.
            stale = "SELECT $1 <= (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
            if expires_ms is not None and await connection.fetchval(stale, expires_ms):
                return f"stale {id}"
            # Where another consumer has the same message at work, this waits for the end of its transaction.
            new = "INSERT INTO consumer_handled (queue, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
            if await connection.execute(new, QUEUE, id) == "INSERT 0 0":
                return f"duplicate {id}"
            await effect(connection, id, key, message.body)
        return f"handled {id} {key}"
    except Exception as error:
        if broke(connection) or (getattr(error, "sqlstate", None) or "").startswith(AWAY):
            raise DatabaseAway(repr(error)) from error
        raise
    finally:
        # If that fails, the pool drops the connection. What is committed is committed.
        with contextlib.suppress(Exception):
            await db.release(connection, timeout=PATIENCE)


def broke(connection: asyncpg.pool.PoolConnectionProxy) -> bool:
    """Whether the connection is lost. The pool may already have taken it from us for that."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


async def effect(connection: asyncpg.Connection, id: uuid.UUID, key: str, body: bytes) -> None:
    """Yours goes here. What it does outside of the transaction, a mail for instance, may happen twice."""
    text = body.decode()
    parsed = json.loads(text)
    if isinstance(parsed, dict) and parsed.get("fail") is True:
        raise RuntimeError("the body says fail")
    insert = "INSERT INTO consumer_effects (message_id, routing_key, body) VALUES ($1, $2, $3::text::jsonb)"
    await connection.execute(insert, id, key, text)


if __name__ == "__main__":
    asyncio.run(main())
