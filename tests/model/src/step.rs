//! What may happen in a world, one step at a time.

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Time goes by, in ms.
    Pass(u64),
    /// A writer takes its number.
    Begin(usize),
    /// A writer writes a row of a kind, due so many ms from now.
    Write { writer: usize, kind: usize, large: bool, due_in: i64 },
    /// A writer commits.
    Commit(usize),
    /// A writer rolls back.
    RollBack(usize),
    /// A transaction that has nothing to do with us takes a number, and is over at once.
    Other,
    /// A daemon goes on with what it is at: asks, is answered, decides.
    Run(usize),
    /// Work beside a daemon's loop goes on; if it can end, it ends in this way.
    RunBeside(usize, usize, Ends),
    /// The next notification arrives at a daemon.
    Notify(usize),
    /// A daemon's session for notifications is lost, with what was on its way.
    Deafen(usize),
    /// It has another.
    Listen(usize),
    /// A daemon's other sessions are lost, and what it is at fails.
    Fail(usize),
    /// One of them was lost, so that the others are in doubt.
    Doubt(usize),
    /// It may keep so many connections for claims.
    Connections(usize, usize),
    /// A daemon's broker is away.
    Close(usize),
    /// It is back.
    Open(usize),
    /// A daemon is killed. What it had locked is free.
    Kill(usize),
    /// It is started again.
    Start(usize),
    /// Its plugins are complete.
    Learn(usize),
    /// A person pauses a kind.
    Pause(usize),
    /// And resumes it.
    Resume(usize),
    /// Somebody promises that all daemons look by themselves for a second.
    Promise,
    /// The database's clock is set, by so many ms.
    SetClock(i64),
    /// A standby takes over, whose clock is so many ms behind.
    FailOver(i64),
}

/// How work beside a loop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ends {
    /// Well: all rows of a delivery have left the queue.
    Settled,
    /// Its rows are to be tried again, so many ms later; a sweep moves up what it finds, where it would go back to it otherwise.
    Again(u64),
    /// The broker did not confirm; what is no delivery fails.
    Unsettled,
    /// PostgreSQL refuses to finish them; what is no delivery fails.
    Refused,
    /// A delivery panicked.
    Panicked,
}
