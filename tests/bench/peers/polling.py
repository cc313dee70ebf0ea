"""Measures the worker that many applications have: it polls a table every second, with FOR UPDATE SKIP LOCKED.

It delivers nothing anywhere: a row counts as delivered when the worker has it in its hands.
"""

import contextlib
import secrets
import threading
import time

import psycopg
from psycopg.conninfo import make_conninfo

from common import DAY_MS, SETTLE_S, check_lead, command_line, drained, due_times, lateness, now_ms, report, wait

# Of the database and of the role that owns it. Both are made for the run, and dropped.
NAME = "peer_polling"
# Rows of one transaction. After a full one the worker does not sleep.
BATCH = 1000
# Slower than it is, so that the first is not due before the last is scheduled.
SCHEDULES_PER_SECOND = 20_000

TABLE = "CREATE TABLE jobs (number bigint PRIMARY KEY, due_at timestamptz NOT NULL); CREATE INDEX ON jobs (due_at)"
SCHEDULE = """
    INSERT INTO jobs SELECT number, 'epoch'::timestamptz + ms * interval '1 ms'
    FROM unnest(%s::bigint[], %s::bigint[]) AS given (number, ms)"""
TAKE = f"""
    WITH due AS (SELECT number FROM jobs WHERE due_at <= now() ORDER BY due_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED)
    DELETE FROM jobs USING due WHERE jobs.number = due.number RETURNING jobs.number"""
RESET = "SELECT pg_stat_statements_reset(%s::regrole, 0, 0)"
CALLS = "SELECT coalesce(sum(calls), 0)::float FROM pg_stat_statements WHERE userid = %s::regrole"


class Worker(threading.Thread):
    def __init__(self, url, poll):
        super().__init__(daemon=True)
        self.db = psycopg.connect(url, autocommit=True)
        self.poll = poll
        self.stopping = threading.Event()
        self.handled = {}
        self.started_ms = now_ms()

    def run(self):
        while not self.stopping.is_set():
            with self.db.transaction():
                rows = self.db.execute(TAKE).fetchall()
                taken_ms = now_ms()
                # Here an application would deliver them.
            for (number,) in rows:
                self.handled.setdefault(number, []).append(taken_ms)
            if len(rows) < BATCH:
                self.stopping.wait(self.poll)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join()
        self.db.close()


@contextlib.contextmanager
def own_database(admin_url):
    """A database of the worker's own role. Yields its URLs for the worker and for who watches it."""
    password = secrets.token_hex()
    leftovers = f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)", f"DROP ROLE IF EXISTS {NAME}"
    create = f"CREATE ROLE {NAME} LOGIN PASSWORD '{password}'", f"CREATE DATABASE {NAME} OWNER {NAME}"
    with psycopg.connect(admin_url, autocommit=True) as admin:
        for statement in leftovers + create:
            admin.execute(statement)
        try:
            watcher_url = make_conninfo(admin_url, dbname=NAME)
            yield make_conninfo(watcher_url, user=NAME, password=password), watcher_url
        finally:
            # Without force: it waits for connections that are about to end.
            for statement in (f"DROP DATABASE {NAME}", f"DROP ROLE {NAME}"):
                admin.execute(statement)


def schedule(url, due):
    with psycopg.connect(url) as db:
        db.execute(SCHEDULE, (list(range(len(due))), due))


def watch(url, seconds):
    """Statements and processor time of the worker, for each minute."""
    with psycopg.connect(url, autocommit=True) as db:
        try:
            db.execute("CREATE EXTENSION pg_stat_statements")
            db.execute(RESET, (NAME,))
            counts = True
        except psycopg.Error:
            counts = False
        cpu = time.process_time()
        time.sleep(seconds)
        cpu = time.process_time() - cpu
        calls = db.execute(CALLS, (NAME,)).fetchone()[0] if counts else None
    return {
        "statements_per_minute": round(calls * 60 / seconds, 1) if counts else None,
        "cpu_s_per_minute": round(cpu * 60 / seconds, 3),
    }


def main():
    poll = "--poll", {"type": float, "default": 1, "help": "seconds of sleep between looks"}
    args = command_line(__doc__, ["lateness", "drain", "idle"], poll)
    with own_database(args.database_url) as (url, watcher_url):
        with psycopg.connect(url) as db:
            db.execute(TABLE)
        if args.mode == "lateness":
            with Worker(url, args.poll) as worker:
                due = due_times(args.rows, args.rate, SCHEDULES_PER_SECOND)
                schedule(url, due)
                check_lead(due)
                wait(lambda: worker.handled, args.rows, due[-1])
            figures = lateness(due, worker.handled)
        elif args.mode == "drain":
            schedule(url, [round(now_ms()) - 1000] * args.rows)
            with Worker(url, args.poll) as worker:
                wait(lambda: worker.handled, args.rows)
            figures = drained(args.rows, worker.started_ms, worker.handled)
        else:
            schedule(url, [round(now_ms()) + DAY_MS])
            with Worker(url, args.poll):
                time.sleep(SETTLE_S)
                figures = watch(watcher_url, args.seconds)
    report(figures)


if __name__ == "__main__":
    main()
