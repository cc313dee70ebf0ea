//! Remembers which rows the lanes are sending, which rows were confirmed while PostgreSQL did not commit their end, and which
//! were finished last. A row whose end was not committed is still due and is claimed again; so is one whose end was lost, because
//! the database failed over to a standby that had not received it. It must then only be finished, never sent a second time,
//! unless the producer has changed it: each row is remembered by its id and a digest of what the producer wrote. The memory ends
//! with the process. No I/O.

use std::collections::HashMap;
use std::sync::Mutex;

use hashlink::LinkedHashMap;
use ring::digest::{Context, SHA256};
use uuid::Uuid;

use crate::model::schedule::Schedule;

/// The most confirmed rows that are remembered, some 20 MiB. Beyond that the oldest are forgotten, and are sent again.
const MAX_CONFIRMED: usize = 100_000;
/// The most finished rows that are remembered, some 3 MiB: those of a second at full speed, and a standby lags less.
const MAX_FINISHED: usize = 10_000;

/// The memory, shared by all lanes. A `Receipt` is what finishing a confirmed row takes.
#[derive(Debug)]
pub struct SentRows<Receipt>(Mutex<State<Receipt>>);

#[derive(Debug)]
struct State<Receipt> {
    /// Rows that a lane is sending. If the lane's session is gone, PostgreSQL lets another lane claim them.
    sending: HashMap<Uuid, Digest>,
    /// Rows that were confirmed and not finished, in the order of their confirms.
    confirmed: LinkedHashMap<Uuid, (Digest, Receipt)>,
    /// Rows that were confirmed and finished last, in the order of their ends.
    finished: LinkedHashMap<Uuid, (Digest, Receipt)>,
}

/// SHA-256 of what the producer wrote.
type Digest = [u8; 32];

/// The rows of a claim, by what remains to be done. Until this value is dropped, no other lane sends the rows in `send`.
#[derive(Debug)]
pub struct Taken<'memory, Receipt> {
    /// Rows to send.
    pub send: Vec<Schedule>,
    /// Rows that were confirmed before and have not changed since: only to be finished.
    pub finish: Vec<(Schedule, Receipt)>,
    sending: Vec<Uuid>,
    memory: &'memory SentRows<Receipt>,
}

impl<Receipt> Default for SentRows<Receipt> {
    fn default() -> Self {
        let (confirmed, finished) = (LinkedHashMap::new(), LinkedHashMap::new());
        Self(Mutex::new(State { sending: HashMap::new(), confirmed, finished }))
    }
}

impl<Receipt: Clone> SentRows<Receipt> {
    /// Divides the rows of a claim into rows to send and rows to finish, and leaves out rows that another lane is sending.
    /// While PostgreSQL refuses to finish rows (`careful`), no row is sent if there are rows to finish, and otherwise one.
    pub fn take(&self, rows: Vec<Schedule>, careful: bool) -> Taken<'_, Receipt> {
        // Computed before the lock is taken: payloads may be large, and other lanes wait for the lock.
        let digests: Vec<Digest> = rows.iter().map(digest).collect();
        let mut state = self.state();
        let (mut send, mut finish) = (Vec::with_capacity(rows.len()), Vec::new());
        let mut sending = Vec::with_capacity(rows.len());
        for (row, written) in rows.into_iter().zip(digests) {
            match state.confirmed.get(&row.id).or_else(|| state.finished.get(&row.id)) {
                _ if state.sending.contains_key(&row.id) => continue,
                Some((before, receipt)) if *before == written => {
                    finish.push((row, receipt.clone()));
                    continue;
                }
                // The producer has changed the row since, so its message is a different one.
                Some(_) => {
                    state.confirmed.remove(&row.id);
                    state.finished.remove(&row.id);
                }
                None => {}
            }
            sending.push((row.id, written));
            send.push(row);
        }
        if careful {
            let max_rows = usize::from(finish.is_empty());
            send.truncate(max_rows);
            sending.truncate(max_rows);
        }
        state.sending.extend(sending.iter().copied());
        let sending = sending.into_iter().map(|(id, _)| id).collect();
        Taken { send, finish, sending, memory: self }
    }

    /// Remembers a row that a lane is sending: its message was confirmed, and its end is not committed.
    pub fn remember(&self, id: Uuid, receipt: Receipt) {
        let mut state = self.state();
        // A row that is only to be finished is remembered already.
        let Some(written) = state.sending.get(&id).copied() else { return };
        state.confirmed.insert(id, (written, receipt));
        if state.confirmed.len() > MAX_CONFIRMED {
            state.confirmed.pop_front();
        }
    }

    /// Notes that the end of these rows is committed. Those with a receipt were confirmed, and are remembered for a while.
    pub fn note_finished(&self, rows: impl Iterator<Item = (Uuid, Option<Receipt>)>) {
        let mut state = self.state();
        for (id, receipt) in rows {
            let before = state.confirmed.remove(&id).map(|(written, _)| written);
            let written = before.or_else(|| state.sending.get(&id).copied());
            if let (Some(written), Some(receipt)) = (written, receipt) {
                state.finished.insert(id, (written, receipt));
                if state.finished.len() > MAX_FINISHED {
                    state.finished.pop_front();
                }
            }
        }
    }
}

impl<Receipt> SentRows<Receipt> {
    fn state(&self) -> std::sync::MutexGuard<'_, State<Receipt>> {
        self.0.lock().expect("no thread panics while it holds the lock")
    }
}

impl<Receipt> Drop for Taken<'_, Receipt> {
    fn drop(&mut self) {
        let mut state = self.memory.state();
        for id in &self.sending {
            state.sending.remove(id);
        }
    }
}

/// A digest that is equal for two versions of a row exactly if they would make the same message.
fn digest(row: &Schedule) -> Digest {
    let Schedule { id, kind, key, subject, due_at, expires_at, payload, headers, .. } = row;
    let mut hash = Context::new(&SHA256);
    // Each part is preceded by its length, so that different rows never give the same bytes.
    let mut add = |part: Option<&[u8]>| {
        hash.update(&part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
        hash.update(part.unwrap_or_default());
    };
    add(Some(id.as_bytes()));
    add(Some(kind.as_bytes()));
    add(key.as_deref().map(str::as_bytes));
    add(subject.as_deref().map(str::as_bytes));
    add(Some(&due_at.unix_timestamp_nanos().to_le_bytes()));
    add(expires_at.map(|at| at.unix_timestamp_nanos().to_le_bytes()).as_ref().map(<[u8; 16]>::as_slice));
    add(Some(payload.as_bytes()));
    for (name, value) in headers {
        add(Some(name.as_bytes()));
        add(Some(value.as_bytes()));
    }
    hash.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use time::OffsetDateTime;

    use super::*;

    fn row(number: u128) -> Schedule {
        Schedule {
            id: Uuid::from_u128(number),
            kind: "k".into(),
            key: None,
            subject: None,
            due_at: OffsetDateTime::UNIX_EPOCH,
            expires_at: None,
            payload: "{}".into(),
            headers: Vec::new(),
            attempts: 0,
            failures: 0,
            refusals: 0,
            untried_since: None,
            recurrence: None,
            nominal_at: None,
            line: None,
            priority: 4,
        }
    }

    fn ids(rows: &[Schedule]) -> Vec<u128> {
        rows.iter().map(|row| row.id.as_u128()).collect()
    }

    /// A memory with one row that was confirmed and not finished.
    fn memory_with<Receipt: Clone>(number: u128, receipt: Receipt) -> SentRows<Receipt> {
        let memory = SentRows::default();
        confirm(&memory, number, receipt);
        memory
    }

    fn confirm<Receipt: Clone>(memory: &SentRows<Receipt>, number: u128, receipt: Receipt) {
        let _lane = memory.take(vec![row(number)], false);
        memory.remember(Uuid::from_u128(number), receipt);
    }

    #[test]
    fn a_confirmed_row_is_only_finished_even_if_its_end_was_committed_and_lost() {
        let memory = memory_with(1, "receipt");
        for _ in 0..2 {
            let taken = memory.take(vec![row(1), row(2)], false);
            assert_eq!((ids(&taken.send), taken.finish[0].1), (vec![2], "receipt"));
            memory.note_finished([(Uuid::from_u128(1), Some("receipt")), (Uuid::from_u128(9), None)].into_iter());
        }
        let expired = memory.take(vec![row(3)], false);
        memory.note_finished([(Uuid::from_u128(3), None)].into_iter());
        drop(expired);
        assert_eq!(ids(&memory.take(vec![row(3)], false).send), [3], "nothing was sent for it");
    }

    #[test]
    fn of_the_finished_rows_the_last_are_remembered() {
        let memory = SentRows::default();
        for number in 0..=MAX_FINISHED as u128 {
            let _lane = memory.take(vec![row(number)], false);
            memory.note_finished([(Uuid::from_u128(number), Some(()))].into_iter());
        }
        let taken = memory.take(vec![row(0), row(1)], false);
        assert_eq!((ids(&taken.send), taken.finish.len()), (vec![0], 1));
    }

    #[test]
    fn a_row_is_sent_again_if_the_producer_has_changed_it_but_not_if_only_the_daemon_has() {
        let changes: [fn(&mut Schedule); 7] = [
            |row| row.kind.push('x'),
            |row| row.key = Some(String::new()),
            |row| row.subject = Some("{}".into()),
            |row| row.due_at += time::Duration::microseconds(1),
            |row| row.expires_at = Some(OffsetDateTime::UNIX_EPOCH),
            |row| row.payload = "{ }".into(),
            |row| row.headers.push(("a".into(), "b".into())),
        ];
        for change in changes {
            let memory = memory_with(1, ());
            let mut changed = row(1);
            change(&mut changed);
            let taken = memory.take(vec![changed], false);
            assert_eq!((taken.send.len(), taken.finish.len()), (1, 0));
        }
        let memory = memory_with(1, ());
        let tried = Schedule { attempts: 1, failures: 1, refusals: 1, ..row(1) };
        assert_eq!(memory.take(vec![tried], false).finish.len(), 1);
    }

    #[test]
    fn rows_that_another_lane_is_sending_are_left_out() {
        let memory: SentRows<()> = SentRows::default();
        let lane = memory.take(vec![row(1), row(2)], false);
        assert_eq!(ids(&memory.take(vec![row(2), row(3)], false).send), [3]);
        drop(lane);
        assert_eq!(ids(&memory.take(vec![row(2)], false).send), [2]);
    }

    #[test]
    fn when_careful_one_row_is_sent_and_none_if_there_is_a_row_to_finish() {
        let memory = SentRows::default();
        assert_eq!(ids(&memory.take(vec![row(1), row(2)], true).send), [1]);
        confirm(&memory, 2, ());
        let taken = memory.take(vec![row(1), row(2)], true);
        assert_eq!((taken.send.len(), taken.finish.len()), (0, 1));
    }

    #[test]
    fn the_memory_is_bounded_and_forgets_the_oldest_row_first() {
        let memory = SentRows::default();
        for number in 0..=MAX_CONFIRMED as u128 {
            confirm(&memory, number, ());
        }
        let taken = memory.take(vec![row(0), row(1)], false);
        assert_eq!((ids(&taken.send), taken.finish.len()), (vec![0], 1));
    }

    /// An event of one of the lanes.
    #[derive(Clone, Debug)]
    enum Event {
        /// A free lane claims these rows. Another lane may be sending them, if its session is gone.
        Claim(Vec<u128>),
        /// The confirms of a lane arrive.
        Confirm(usize),
        /// A lane ends; whether its transaction was committed.
        End(usize, bool),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            prop::collection::btree_set(0..6_u128, 1..4).prop_map(|rows| Event::Claim(rows.into_iter().collect())),
            (0..4_usize).prop_map(Event::Confirm),
            (0..4_usize, any::<bool>()).prop_map(|(lane, committed)| Event::End(lane, committed)),
        ]
    }

    proptest! {
        /// Sessions end at random, so a row may be claimed while another lane is sending it.
        #[test]
        fn no_row_is_sent_again_once_its_confirm_has_arrived(events in prop::collection::vec(event(), 1..200)) {
            let memory = SentRows::default();
            let mut lanes: Vec<Option<(Taken<'_, ()>, bool)>> = (0..4).map(|_| None).collect();
            let mut confirmed = HashSet::new();
            for event in events {
                match event {
                    Event::Claim(rows) => {
                        let Some(free) = lanes.iter().position(Option::is_none) else { continue };
                        // A row whose end was committed may be due again, if the end was lost.
                        let taken = memory.take(rows.into_iter().map(row).collect(), false);
                        for row in &taken.send {
                            prop_assert!(!confirmed.contains(&row.id), "{} is sent again", row.id);
                        }
                        lanes[free] = Some((taken, false));
                    }
                    Event::Confirm(lane) => {
                        if let Some((taken, arrived)) = &mut lanes[lane] {
                            *arrived = true;
                            confirmed.extend(taken.send.iter().map(|row| row.id));
                        }
                    }
                    Event::End(lane, committed) => {
                        let Some((taken, arrived)) = lanes[lane].take() else { continue };
                        let sent = taken.send.iter().filter(|_| arrived);
                        if committed {
                            let ended = sent.chain(taken.finish.iter().map(|(row, ())| row));
                            memory.note_finished(ended.map(|row| (row.id, Some(()))));
                        } else {
                            sent.for_each(|row| memory.remember(row.id, ()));
                        }
                    }
                }
            }
        }
    }
}
