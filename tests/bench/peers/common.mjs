// What graphile-worker.mjs and pg-boss.mjs share: the command line, their own database, and the three measurements.

import { randomBytes } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import pg from 'pg';

// From the end of scheduling to the first due time.
const LEAD_MS = 6_000;
// Slower than both are, so that the first is not due before the last is scheduled.
const SCHEDULES_PER_SECOND = 4_000;
// How many are scheduled by one call.
const CHUNK = 1_000;
// So long after the last sign of life, and after the last due time, what has not been handled is lost.
const QUIET_MS = 30_000;
// From the worker's start until an idle worker is watched.
const SETTLE_MS = 10_000;
const DAY_MS = 24 * 60 * 60 * 1_000;

/**
 * Runs what the command line says. `name` is that of the database and of the role that owns it, both of which are made
 * for the run and dropped. `open(url, { poll, tuned })` installs the peer there and resolves to
 * `{ add, work, close }`: `add(jobs)` schedules `[{ number, dueAt }]`; `work(note)` starts a worker that calls
 * `note(number)` for each job, and resolves to the time in milliseconds at which it began to look for some.
 */
export async function measure(name, open) {
  const { mode, databaseUrl, rows, rate, seconds, poll, tuned } = commandLine();
  const figures = await withDatabase(databaseUrl, name, async (url, watcher) => {
    const peer = await open(url, { poll, tuned });
    const handled = new Map();
    const work = () => peer.work((number) => handled.set(number, [...(handled.get(number) ?? []), Date.now()]));
    const measurements = {
      async lateness() {
        await work();
        const first = Date.now() + LEAD_MS + (rows / SCHEDULES_PER_SECOND) * 1_000;
        const due = Array.from({ length: rows }, (_, number) => Math.round(first + (number * 1_000) / rate));
        await schedule(peer, due);
        if (first - Date.now() < 1_000) throw new Error('Scheduling took too long: the first are due already.');
        await untilHandled(handled, rows, due.at(-1));
        return lateness(due, handled);
      },
      async drain() {
        await schedule(peer, Array(rows).fill(Date.now() - 1_000));
        const started = await work();
        await untilHandled(handled, rows, 0);
        const last = [...handled.values()].reduce((latest, [ms]) => Math.max(latest, ms), 0);
        return { rows_per_s: Math.round((handled.size / (last - started)) * 1_000), lost: rows - handled.size };
      },
      async idle() {
        await schedule(peer, [Date.now() + DAY_MS]);
        await work();
        await sleep(SETTLE_MS);
        return await watch(watcher, name, seconds);
      },
    };
    try {
      return await measurements[mode]();
    } finally {
      await peer.close();
    }
  });
  console.log(JSON.stringify(figures));
}

function commandLine() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      'database-url': { type: 'string', default: process.env.DATABASE_URL ?? '' },
      // As in the other scripts; nothing is sent there.
      'amqp-url': { type: 'string' },
      rows: { type: 'string', default: '500' },
      rate: { type: 'string', default: '50' },
      seconds: { type: 'string', default: '60' },
      poll: { type: 'string', default: '2' },
      tuned: { type: 'boolean', default: false },
    },
  });
  const [mode] = positionals;
  if (!['lateness', 'drain', 'idle'].includes(mode)) throw new Error('Say lateness, drain or idle.');
  const numbers = ['rows', 'rate', 'seconds', 'poll'].map((option) => [option, Number(values[option])]);
  return { mode, databaseUrl: values['database-url'], tuned: values.tuned, ...Object.fromEntries(numbers) };
}

async function withDatabase(adminUrl, name, use) {
  const password = randomBytes(32).toString('hex');
  const leftovers = [`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`, `DROP ROLE IF EXISTS ${name}`];
  const create = [`CREATE ROLE ${name} LOGIN PASSWORD '${password}'`, `CREATE DATABASE ${name} OWNER ${name}`];
  const url = new URL(adminUrl);
  url.pathname = name;
  const watcherUrl = url.href;
  Object.assign(url, { username: name, password });
  const admin = new pg.Client(adminUrl);
  await admin.connect();
  try {
    for (const statement of [...leftovers, ...create]) await admin.query(statement);
    const watcher = new pg.Client(watcherUrl);
    await watcher.connect();
    try {
      return await use(url.href, watcher);
    } finally {
      await watcher.end();
    }
  } finally {
    // Without force: it waits for connections that are about to end, and does not break them.
    for (const statement of [`DROP DATABASE ${name}`, `DROP ROLE ${name}`]) await admin.query(statement);
    await admin.end();
  }
}

async function schedule(peer, due) {
  const jobs = due.map((ms, number) => ({ number, dueAt: new Date(ms) }));
  for (let start = 0; start < jobs.length; start += CHUNK) await peer.add(jobs.slice(start, start + CHUNK));
}

/** Until each has been handled once, or nothing happens any more. */
async function untilHandled(handled, rows, lastDue) {
  let count = 0;
  let since = Date.now();
  while (handled.size < rows && Date.now() - Math.max(since, lastDue) < QUIET_MS) {
    if (handled.size > count) {
      count = handled.size;
      since = Date.now();
    }
    await sleep(100);
  }
}

function lateness(due, handled) {
  const late = [...handled].map(([number, [ms]]) => ms - due[number]).sort((a, b) => a - b);
  const at = (percent) => late[Math.ceil((late.length * percent) / 100) - 1] ?? null;
  const early = late.filter((ms) => ms < 0).length;
  return { p50_ms: at(50), p99_ms: at(99), max_ms: at(100), lost: due.length - late.length, early };
}

/** Statements and processor time of the worker, for each minute. */
async function watch(watcher, role, seconds) {
  let counts = true;
  try {
    await watcher.query('CREATE EXTENSION pg_stat_statements');
    await watcher.query('SELECT pg_stat_statements_reset($1::regrole, 0, 0)', [role]);
  } catch {
    counts = false;
  }
  const before = process.cpuUsage();
  await sleep(seconds * 1_000);
  const { user, system } = process.cpuUsage(before);
  const figures = { statements_per_minute: null, cpu_s_per_minute: round((user + system) / 1e6, 3) };
  if (counts) {
    const calls = 'SELECT coalesce(sum(calls), 0)::float AS calls FROM pg_stat_statements WHERE userid = $1::regrole';
    figures.statements_per_minute = round((await watcher.query(calls, [role])).rows[0].calls, 1);
  }
  return figures;

  function round(value, digits) {
    return Number(((value * 60) / seconds).toFixed(digits));
  }
}
