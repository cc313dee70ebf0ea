//! Messages that consumers rejected or that expired in a consumer's queue, and what becomes of them: the daemon's
//! passes over `tidings.dead`, and what a person does to dead and parked messages with a command or on the page.
//!
//! Must never delay a row that is due, acknowledge a dead letter before RabbitMQ has confirmed its copy, or let two
//! passes run at the same time.
//!
//! When a consumer rejects a message, RabbitMQ moves it from the consumer's queue to `tidings.dead`. From there it goes
//! like this:
//!
//! 1. When it is time for a pass, one daemon takes the advisory lock of the exchange in PostgreSQL, on a session of its
//!    own. The lock ends with the session. The daemon records that a pass begins, and opens a connection to RabbitMQ
//!    for it.
//! 2. It counts the dead letters, and fetches that many, so a message that consumers always reject costs one replay in
//!    each pass and delays no other message.
//! 3. It fetches them in windows of at most 100 messages or 8 MiB of bodies, which bounds its memory. For each window
//!    it asks the session for the time. An answer also shows that the daemon still has the lock.
//! 4. `DeadLetter::fate` decides what becomes of each. A dead letter whose deadline has passed is removed. One to be
//!    replayed is published to the default exchange with the name of its queue as the routing key, mandatory, and is
//!    acknowledged after RabbitMQ has confirmed the copy and did not return it. If the queue does not exist, the dead
//!    letter is parked; if the queue does not take it, for instance because it is full, it goes to the end of
//!    `tidings.dead`.
//! 5. What the pass did not acknowledge is back in `tidings.dead` when its channel closes. At SIGTERM a pass ends after
//!    the current window, because ending within a window would leave copies.

pub mod admin;
mod list;
pub mod replayer;
