// Measures pg-boss, a job queue in PostgreSQL, with jobs that are due later (startAfter).

import { PgBoss } from 'pg-boss';
import { measure } from './common.mjs';

// By default a worker fetches one job, and then none for two seconds.
const BATCHES = { batchSize: 100, burstWhenBatchFull: true };
const LARGER_BATCHES = { batchSize: 1_000, burstWhenBatchFull: true };

await measure('peer_pg_boss', async (url, { poll, tuned }) => {
  const boss = new PgBoss(url);
  boss.on('error', console.error);
  await boss.start();
  await boss.createQueue('notes');
  return {
    add: (jobs) => boss.insert('notes', jobs.map(({ number, dueAt }) => ({ data: { number }, startAfter: dueAt }))),
    async work(note) {
      const began = Date.now();
      const options = { pollingIntervalSeconds: poll, ...(tuned ? LARGER_BATCHES : BATCHES) };
      await boss.work('notes', options, async (jobs) => jobs.forEach(({ data }) => note(data.number)));
      return began;
    },
    close: () => boss.stop(),
  };
});
