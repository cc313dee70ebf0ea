"""Measures Celery tasks with an ETA over RabbitMQ; the module is the producer's program and the worker's application.

With --quorum the queue is a quorum queue behind a topic exchange, and Celery lets RabbitMQ hold what is not due
(native delayed delivery). Without, which is the default, the worker holds it in its memory.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from celery import Celery
from celery.signals import worker_ready

from common import DAY_MS, SETTLE_S, check_lead, command_line, drained, due_times, lateness, now_ms, report, wait

QUEUE = "peer-celery"
# Slower than it is, so that the first is not due before the last is scheduled.
SCHEDULES_PER_SECOND = 800
# For the mode `kill`.
KILL_ROWS = 200
KILL_LEAD_MS = 20_000

# How the program tells the worker, which is another process.
AMQP_URL, QUORUM, TIMES = "PEER_AMQP_URL", "PEER_QUORUM", "PEER_TIMES"

app = Celery("celery_eta", set_as_current=True)


def configure():
    app.conf.update(broker_url=os.environ[AMQP_URL], task_default_queue=QUEUE)
    if QUORUM in os.environ:
        app.conf.update(task_default_queue_type="quorum", task_default_exchange_type="topic")


def write_down(what):
    """One short write at the end of the file, so that those of several processes do not mix."""
    os.write(times_file, f"{what} {now_ms():.3f}\n".encode())


@app.task(name="note")
def note(number):
    write_down(number)


@worker_ready.connect
def ready(**_):
    write_down("ready")


class Worker:
    """A worker with default settings: as many processes as there are processors, tasks acknowledged when they begin."""

    def __init__(self, times):
        before = len(times()["ready"])
        command = [sys.executable, "-m", "celery", "--app", "celery_eta", "worker"]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=sys.stderr, start_new_session=True)
        while len(times()["ready"]) == before:
            if self.process.poll() is not None:
                raise SystemExit("The worker did not start.")
            time.sleep(0.05)
        self.ready_ms = times()["ready"][-1]

    def cpu(self):
        """Seconds of its processes, which are those of its process group."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill(self):
        """All of its processes at once, as when its container is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()


@contextlib.contextmanager
def times_of_tasks():
    """Yields a function that returns the times of each task that has run, by number, and of each start ("ready")."""
    with tempfile.NamedTemporaryFile("r") as file:
        os.environ[TIMES] = file.name
        known = {"ready": []}

        def times():
            for line in file:
                what, ms = line.split()
                known.setdefault(what if what == "ready" else int(what), []).append(float(ms))
            return known

        yield times


def tasks(times):
    return {number: found for number, found in times().items() if number != "ready"}


def schedule(due):
    """Celery has no call for many at once."""
    for number, ms in enumerate(due):
        note.apply_async((number,), eta=datetime.fromtimestamp(ms / 1000, timezone.utc))


def waiting_in_queue():
    """How many messages lie in the queue that no worker holds."""
    with app.connection_for_write() as connection:
        return connection.default_channel.queue_declare(QUEUE, passive=True).message_count


def clean():
    """Removes all that Celery declares, before and after."""
    delays = [f"celery_delayed_{level}" for level in range(28)]
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        for name in [QUEUE, *delays]:
            channel.queue_delete(name)
        for name in [QUEUE, *delays, "celery_delayed_delivery", "celery.pidbox", "reply.celery.pidbox", "celeryev"]:
            channel.exchange_delete(name)


def seconds_until(true, patience=10):
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > patience:
            return None
        time.sleep(0.05)
    return round(time.monotonic() - began, 2)


def measure_lateness(args, times):
    with Worker(times):
        due = due_times(args.rows, args.rate, SCHEDULES_PER_SECOND)
        schedule(due)
        check_lead(due)
        wait(lambda: tasks(times), args.rows, due[-1])
    return lateness(due, tasks(times))


def measure_drain(args, times):
    # Before a worker has started, nobody has declared the queue.
    with app.connection_for_write() as connection:
        app.amqp.queues[QUEUE].bind(connection.default_channel).declare()
    schedule([now_ms() - 1000] * args.rows)
    with Worker(times) as worker:
        wait(lambda: tasks(times), args.rows)
    return drained(args.rows, worker.ready_ms, tasks(times))


def measure_idle(args, times):
    with Worker(times) as worker:
        schedule([now_ms() + DAY_MS])
        time.sleep(SETTLE_S)
        cpu = worker.cpu()
        time.sleep(args.seconds)
        cpu = worker.cpu() - cpu
    return {"statements_per_minute": None, "cpu_s_per_minute": round(cpu * 60 / args.seconds, 3)}


def measure_kill(_, times):
    with Worker(times) as worker:
        due = [now_ms() + KILL_LEAD_MS] * KILL_ROWS
        schedule(due)
        # Until the worker holds them all; with --quorum the broker does, and none is in this queue.
        if seconds_until(lambda: waiting_in_queue() == 0) is None:
            raise SystemExit("The worker did not take the tasks.")
        worker.kill()
    back_s = seconds_until(lambda: waiting_in_queue() == KILL_ROWS)
    with Worker(times):
        wait(lambda: tasks(times), KILL_ROWS, due[-1])
        # For those that might come again.
        time.sleep(5)
    runs = [len(found) for found in tasks(times).values()]
    return {
        "once": runs.count(1),
        "twice": sum(run > 1 for run in runs),
        "never": KILL_ROWS - len(runs),
        "back_in_queue_s": back_s,
    }


def main():
    modes = {"lateness": measure_lateness, "drain": measure_drain, "idle": measure_idle, "kill": measure_kill}
    quorum = "--quorum", {"action": "store_true"}
    args = command_line(__doc__, modes, quorum)
    # What ends this program ends the worker too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ[AMQP_URL] = args.amqp_url
    if args.quorum:
        os.environ[QUORUM] = "1"
    configure()
    clean()
    try:
        with times_of_tasks() as times:
            report(modes[args.mode](args, times))
    finally:
        clean()


if __name__ == "__main__":
    main()
else:
    configure()
    times_file = os.open(os.environ[TIMES], os.O_WRONLY | os.O_APPEND)
