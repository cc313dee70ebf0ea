//! Reads the messages in the payloads of rows of the kind `relay`. No plugin is asked.
//!
//! Must never pass a message on to an exchange that no intake of this daemon names: producers may write such rows by SQL.

use std::collections::BTreeSet;
use std::sync::Arc;

use ring::digest::{SHA256, digest};
use tracing::warn;

use crate::model::backoff::{REFUSED, jittered};
use crate::model::event::hex;
use crate::model::relay::Relayed;
use crate::model::schedule::Schedule;
use crate::store::Outcome;

/// Payloads with more bytes than this together are read on another thread, since no other row would be delivered meanwhile.
const MAX_BYTES_HERE: usize = 128 * 1024;

/// A row whose payload was read: the message and the SHA-256 of the payload, or what becomes of the row instead.
pub(super) type Read = (Schedule, Result<(Relayed, String), Outcome>);

/// Reads the payloads of `rows`, and takes them out. `targets` are the exchanges that intakes name.
pub(super) async fn read(rows: Vec<Schedule>, targets: &Arc<BTreeSet<String>>) -> Vec<Read> {
    let bytes: usize = rows.iter().map(|row| row.payload.len()).sum();
    let targets = Arc::clone(targets);
    let read_all = move || rows.into_iter().map(|row| read_one(row, &targets)).collect();
    if bytes <= MAX_BYTES_HERE {
        return read_all();
    }
    tokio::task::spawn_blocking(read_all).await.expect("reading a payload does not panic")
}

fn read_one(mut row: Schedule, targets: &BTreeSet<String>) -> Read {
    let payload = std::mem::take(&mut row.payload);
    let id = row.id;
    let read = match Relayed::from_payload(&payload) {
        Ok(relayed) if targets.contains(&relayed.exchange) => {
            Ok((relayed, hex(digest(&SHA256, payload.as_bytes()).as_ref())))
        }
        Ok(relayed) => {
            let error = format!(
                "no intake of this daemon names the exchange {:?}: add it to TIDINGS_INTAKE, or cancel the row",
                relayed.exchange
            );
            if row.refusals == 0 {
                warn!(schedule.id = %id, error, "{id} is not relayed, so the row waits");
            }
            Err(Outcome::Refused { error, after: jittered(&REFUSED, row.refusals) })
        }
        Err(error) => {
            let reason = error.to_string();
            warn!(schedule.id = %id, reason, "parked {id}: it cannot be relayed");
            Err(Outcome::Parked(reason))
        }
    };
    (row, read)
}
