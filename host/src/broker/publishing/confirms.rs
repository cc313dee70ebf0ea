//! Which messages of a batch RabbitMQ has confirmed, refused or returned. Decides nothing else. No I/O, no clock.
//!
//! Must never count a message as confirmed that was not acked, or that was returned: RabbitMQ acks a message that no queue
//! takes as well, after it has returned it.

use tokio::time::Instant;
use uuid::Uuid;

use crate::broker::{Confirmed, Verdict};

/// Why a message with a nack was refused: a queue is full, or has no leader that this node knows.
pub(super) const NACKED: &str = "a queue refused the message (nack)";

/// The confirms of one batch on one channel.
#[derive(Debug)]
pub(in crate::broker) struct Confirms {
    /// The number that RabbitMQ gives the first message of the batch. It counts the messages of each channel from 1 on.
    first: u64,
    answers: Vec<Answer>,
    /// How many messages have no answer.
    open: usize,
    /// The messages before this index have an answer.
    answered_before: usize,
}

#[derive(Clone, Debug)]
struct Answer {
    id: Uuid,
    /// Why RabbitMQ returned the message.
    returned: Option<String>,
    kind: AnswerKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerKind {
    None,
    Ack(Instant),
    Nack,
}

impl Confirms {
    /// A batch of messages with these ids, in the order in which they are published.
    pub(super) fn new(first: u64, ids: impl Iterator<Item = Uuid>) -> Self {
        let answers: Vec<_> = ids.map(|id| Answer { id, returned: None, kind: AnswerKind::None }).collect();
        Self { first, open: answers.len(), answers, answered_before: 0 }
    }

    /// Notes an ack (with its time) or a nack (`None`) of the message with this number, and if `multiple`, of all before it.
    /// Returns whether the channel has such a message; RabbitMQ breaks the protocol if not.
    pub(super) fn answer(&mut self, number: u64, multiple: bool, acked_at: Option<Instant>) -> bool {
        let index = number.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        let Some(last) = index.filter(|index| *index < self.answers.len()) else { return false };
        let kind = acked_at.map_or(AnswerKind::Nack, AnswerKind::Ack);
        let from = if multiple { self.answered_before } else { last };
        for answer in &mut self.answers[from.min(last)..=last] {
            if answer.kind == AnswerKind::None {
                answer.kind = kind;
                self.open -= 1;
            }
        }
        if multiple || self.answered_before == last {
            self.answered_before = self.answered_before.max(last + 1);
        }
        true
    }

    /// Notes that RabbitMQ returned the message with this id.
    pub(super) fn note_return(&mut self, id: Uuid, why: String) {
        if let Some(answer) = self.answers.iter_mut().find(|answer| answer.id == id) {
            answer.returned = Some(why);
        }
    }

    /// Whether each message has an answer.
    pub(super) fn is_complete(&self) -> bool {
        self.open == 0
    }

    /// Whether RabbitMQ has refused a message.
    pub(super) fn has_nack(&self) -> bool {
        self.answers.iter().any(|answer| answer.kind == AnswerKind::Nack)
    }

    /// The verdicts on the messages, in their order.
    pub(super) fn into_verdicts(self) -> Vec<Verdict> {
        let verdict = |answer: Answer| match (answer.returned, answer.kind) {
            (Some(why), _) => Verdict::Refused(why),
            (None, AnswerKind::Ack(at)) => Verdict::Confirmed(Confirmed { at }),
            (None, AnswerKind::Nack) => Verdict::Refused(NACKED.into()),
            (None, AnswerKind::None) => Verdict::Unknown,
        };
        self.answers.into_iter().map(verdict).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn confirms(first: u64, count: u128) -> Confirms {
        Confirms::new(first, (0..count).map(Uuid::from_u128))
    }

    fn letters(confirms: Confirms) -> String {
        let letter = |verdict: &Verdict| match verdict {
            Verdict::Confirmed(_) => 'c',
            Verdict::Refused(why) if why.contains("nack") => 'n',
            Verdict::Refused(_) => 'r',
            Verdict::Poison(_) => 'p',
            Verdict::Unknown => '?',
        };
        confirms.into_verdicts().iter().map(letter).collect()
    }

    #[test]
    fn a_returned_message_is_refused_although_it_is_acked() {
        let mut batch = confirms(1, 3);
        batch.note_return(Uuid::from_u128(1), "no queue".into());
        assert!(batch.answer(3, true, Some(Instant::now())) && batch.is_complete());
        assert_eq!(letters(batch), "crc");
    }

    #[test]
    fn a_message_without_an_answer_is_unknown() {
        let mut batch = confirms(10, 4);
        assert!(batch.answer(11, false, Some(Instant::now())) && batch.answer(13, false, None));
        assert!(!batch.is_complete());
        assert_eq!(letters(batch), "?c?n");
    }

    #[test]
    fn an_answer_for_a_message_of_another_batch_changes_nothing() {
        let mut batch = confirms(10, 2);
        assert!(!batch.answer(9, true, Some(Instant::now())) && !batch.answer(12, false, Some(Instant::now())));
        assert!(!batch.answer(0, true, Some(Instant::now())));
        assert_eq!(letters(batch), "??");
    }

    proptest! {
        /// Beside a model: one answer for each message, set one by one.
        #[test]
        fn each_message_has_the_first_answer_that_covers_it(
            first in 1..1_000_u64,
            answers in prop::collection::vec((0..12_u64, any::<bool>(), any::<bool>()), 0..20),
        ) {
            let mut batch = confirms(first, 10);
            let mut model = ['?'; 10];
            for (number, multiple, ack) in answers {
                let known = batch.answer(first + number, multiple, ack.then(Instant::now));
                prop_assert_eq!(known, number < 10);
                let Ok(last) = usize::try_from(number) else { continue };
                for (index, answer) in model.iter_mut().enumerate() {
                    if known && *answer == '?' && (index == last || multiple && index < last) {
                        *answer = if ack { 'c' } else { 'n' };
                    }
                }
            }
            prop_assert_eq!(batch.is_complete(), !model.contains(&'?'));
            prop_assert_eq!(letters(batch), model.iter().collect::<String>());
        }
    }
}
