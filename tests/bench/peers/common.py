"""What polling.py and celery_eta.py share: the command line, the due times, the wait, and the figures."""

import argparse
import json
import math
import os
import time

# From the end of scheduling to the first due time.
LEAD_S = 6
# So long after the last sign of life, and after the last due time, what has not been handled is lost.
QUIET_S = 30
# From the worker's start until an idle worker is watched.
SETTLE_S = 10
DAY_MS = 24 * 60 * 60 * 1000


def now_ms():
    return time.time_ns() / 1e6


def command_line(description, modes, *further):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL", ""))
    parser.add_argument("--amqp-url", default=os.environ.get("AMQP_URL", ""))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50, help="how many fall due in a second")
    parser.add_argument("--seconds", type=float, default=60, help="for how long an idle worker is watched")
    for names, settings in further:
        parser.add_argument(names, **settings)
    return parser.parse_args()


def due_times(rows, rate, schedules_per_second):
    """One after the other, the first LEAD_S after the end of scheduling, if that is as fast as they say."""
    first = now_ms() + (LEAD_S + rows / schedules_per_second) * 1000
    return [round(first + number * 1000 / rate) for number in range(rows)]


def check_lead(due):
    if due[0] - now_ms() < 1000:
        raise SystemExit("Scheduling took too long: the first are due already.")


def wait(handled, rows, last_due_ms=0):
    """Until each has been handled once, or nothing happens any more. `handled` returns the times by number."""
    count, since = 0, now_ms()
    while (more := len(handled())) < rows:
        if more > count:
            count, since = more, now_ms()
        elif now_ms() - max(since, last_due_ms) > QUIET_S * 1000:
            break
        time.sleep(0.1)


def lateness(due, handled):
    late = sorted(times[0] - due[number] for number, times in handled.items())

    def at(percent):
        return round(late[math.ceil(len(late) * percent / 100) - 1], 1) if late else None

    return {
        "p50_ms": at(50),
        "p99_ms": at(99),
        "max_ms": at(100),
        "lost": len(due) - len(late),
        "early": sum(ms < 0 for ms in late),
    }


def drained(rows, started_ms, handled):
    last = max((times[0] for times in handled.values()), default=math.inf)
    return {"rows_per_s": round(len(handled) / (last - started_ms) * 1000), "lost": rows - len(handled)}


def report(figures):
    print(json.dumps(figures), flush=True)
