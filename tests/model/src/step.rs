//! The steps of a world.

/// One step. Numbers without a name are a writer, a daemon or a kind, as the comment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// This many ms pass.
    Pass(u64),
    /// A writer's transaction takes its number.
    Begin(usize),
    /// A writer writes a row of a kind that is due in `due_in` ms.
    Write { writer: usize, kind: usize, large: bool, due_in: i64 },
    /// A writer commits.
    Commit(usize),
    /// A writer rolls back.
    RollBack(usize),
    /// A transaction that does not touch the queue takes a number and ends at once.
    OtherTransaction,
    /// A daemon's loop goes on to its next stage.
    Run(usize),
    /// The task with this index beside a daemon's loop goes on; if it can end, it ends in this way.
    RunBackground(usize, usize, Ending),
    /// The notifications that were sent to a daemon arrive.
    Notify(usize),
    /// A daemon's listening session is lost, and with it the notifications that have not arrived.
    LoseListener(usize),
    /// A daemon opens another listening session.
    RestoreListener(usize),
    /// All other sessions of a daemon are lost; its look or claim fails.
    LoseSessions(usize),
    /// One session of a daemon is lost, so the daemon doubts the others.
    Doubt(usize),
    /// A daemon may keep this many connections for claims.
    SetConnections(usize, usize),
    /// RabbitMQ is away for a daemon.
    CloseBroker(usize),
    /// RabbitMQ is back for a daemon.
    OpenBroker(usize),
    /// A daemon is killed. The rows that it had locked are free.
    Kill(usize),
    /// A daemon is started again.
    Start(usize),
    /// A daemon has loaded all its plugins.
    LoadPlugins(usize),
    /// The operator pauses a kind.
    Pause(usize),
    /// The operator resumes a kind.
    Resume(usize),
    /// A listener promises that all daemons poll for a second, so that triggers need not notify.
    Promise,
    /// The database's clock is set forward by this many ms, or back.
    SetClock(i64),
    /// A standby takes over whose clock is this many ms behind.
    FailOver(i64),
}

/// How a task beside a loop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ending {
    /// Successfully: all rows of a delivery have left the queue.
    Settled,
    /// The rows of a delivery are tried again this many ms later. A sweep moves the rows that it finds below the mark up;
    /// otherwise it moves the mark back.
    Retried(u64),
    /// RabbitMQ did not confirm. A task that is not a delivery fails.
    Unsettled,
    /// PostgreSQL refuses to finish the rows. A task that is not a delivery fails.
    Refused,
    /// The delivery panicked.
    Panicked,
}
