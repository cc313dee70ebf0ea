// Measures graphile-worker, a job queue in PostgreSQL, with jobs that are due later (runAt).

import { EventEmitter, once } from 'node:events';
import { Logger, WorkerPreset, makeWorkerUtils, run } from 'graphile-worker';
import { measure } from './common.mjs';

// What its documentation gives for the most throughput.
const TUNED = { concurrentJobs: 24, maxPoolSize: 25, localQueue: { size: 500 }, completeJobBatchDelay: 0 };

await measure('peer_graphile_worker', async (url, { poll, tuned }) => {
  const events = new EventEmitter();
  const preset = {
    extends: [WorkerPreset],
    worker: {
      connectionString: url,
      pollInterval: poll * 1_000,
      concurrentJobs: 10,
      maxPoolSize: 12,
      ...(tuned && TUNED),
      // It would write a line for each job.
      logger: new Logger(() => () => {}),
      events,
    },
  };
  const utils = await makeWorkerUtils({ preset });
  await utils.migrate();
  let runner;
  return {
    add: (jobs) =>
      utils.addJobs(jobs.map(({ number, dueAt }) => ({ identifier: 'note', payload: { number }, runAt: dueAt }))),
    async work(note) {
      const began = once(events, 'worker:getJob:start').then(() => Date.now());
      runner = await run({ preset, taskList: { note: ({ number }) => note(number) } });
      return await began;
    },
    async close() {
      await runner?.stop();
      await utils.release();
    },
  };
});
