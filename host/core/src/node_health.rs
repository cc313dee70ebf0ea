//! When the daemon leaves the node of RabbitMQ that it is connected to, because that node takes no message.
//!
//! A node may be cut off from the others, with which its queues have their majority: then confirms do not come. Or it knows no
//! leader of a queue that has one, and refuses each message with a nack. While it takes some messages, only the queues of the others
//! are in trouble, which is so on any node.

use std::time::Duration;

use super::Moment;
use crate::backoff::Backoff;

/// How long a node may take no message: as long as a batch waits for its confirms. For refusals it doubles with each node in a row
/// that was left: if all of them refuse everything, a queue is full.
const PATIENCE: Backoff = Backoff::new(Duration::from_secs(10), Duration::from_mins(2));

/// What a batch of messages got for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// The node took a message, or returned one that no queue takes.
    Taken,
    /// The node refused all messages, with nacks.
    Refused,
    /// No answer came in time.
    Missing,
}

/// What the daemon knows of the node that it is connected to.
#[derive(Clone, Debug, Default)]
pub struct NodeHealth {
    /// When the node last took a message; before that, when the connection was made.
    taken_at: Moment,
    /// Since when the node has refused everything. A single nack after a quiet hour says nothing yet.
    refused_since: Option<Moment>,
    /// How many nodes were left in a row, none of which took a message.
    left: u32,
}

impl NodeHealth {
    /// Notes that a connection was made, to this node or another one.
    pub fn connected(&mut self, now: Moment) {
        *self = Self { taken_at: now, left: self.left, ..Self::default() };
    }

    /// Notes what a batch got, and returns whether to leave the node.
    #[must_use]
    pub fn answered(&mut self, now: Moment, answers: Answers) -> bool {
        let (since, left) = match answers {
            Answers::Taken => {
                *self = Self { taken_at: now, ..Self::default() };
                return false;
            }
            Answers::Missing => (self.taken_at, 0),
            Answers::Refused => (*self.refused_since.get_or_insert(now), self.left),
        };
        let leaves = now.saturating_sub(since) >= PATIENCE.delay(left);
        if leaves {
            self.left = self.left.saturating_add(1);
        }
        leaves
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    /// A node that was connected at this second.
    fn connected(second: u64) -> NodeHealth {
        let mut node = NodeHealth::default();
        node.connected(seconds(second));
        node
    }

    /// The second at which a node is left that refuses a batch in each second from `from` on.
    fn left_after_refusals(node: &mut NodeHealth, from: u64) -> u64 {
        (from..from + 1_000).find(|second| node.answered(seconds(*second), Answers::Refused)).expect("in the end")
    }

    #[test]
    fn a_single_refusal_after_a_quiet_time_does_not_leave_the_node() {
        let mut node = connected(0);
        assert!(!node.answered(seconds(3_600), Answers::Refused));
        assert!(!node.answered(seconds(3_601), Answers::Taken));
        assert!(!node.answered(seconds(9_000), Answers::Refused));
    }

    #[test]
    fn a_node_is_left_after_ten_seconds_of_refusals() {
        let mut node = connected(0);
        assert!(!node.answered(seconds(5), Answers::Taken));
        assert_eq!(left_after_refusals(&mut node, 6), 16);
    }

    #[test]
    fn while_all_nodes_refuse_everything_they_are_left_ever_less_often_until_one_takes_a_message() {
        let (mut node, mut now) = (connected(0), 0);
        for expected in [10, 20, 40, 80, 120, 120] {
            let left = left_after_refusals(&mut node, now);
            assert_eq!(left - now, expected);
            now = left;
            node.connected(seconds(now));
        }
        assert!(!node.answered(seconds(now), Answers::Taken));
        node.connected(seconds(now));
        assert_eq!(left_after_refusals(&mut node, now) - now, 10);
    }

    #[test]
    fn a_node_is_left_when_the_confirms_of_a_batch_did_not_come_and_it_took_no_other_one_meanwhile() {
        let mut node = connected(0);
        assert!(!node.answered(seconds(5), Answers::Taken));
        assert!(!node.answered(seconds(12), Answers::Missing));
        assert!(node.answered(seconds(15), Answers::Missing));
    }

    proptest! {
        #[test]
        fn a_node_is_never_left_sooner_than_ten_seconds_after_it_was_connected_or_took_a_message(
            steps in proptest::collection::vec((0_u64..5_000, 0_usize..4), 0..100)
        ) {
            let (mut node, mut now, mut since) = (NodeHealth::default(), Duration::ZERO, Duration::ZERO);
            for (ms, step) in steps {
                now += Duration::from_millis(ms);
                let answers = [Answers::Taken, Answers::Refused, Answers::Missing].get(step);
                let leaves = answers.is_some_and(|answers| node.answered(now, *answers));
                prop_assert!(!leaves || now.saturating_sub(since) >= Duration::from_secs(10));
                if answers.is_none() || leaves {
                    node.connected(now);
                }
                if answers.is_none() || leaves || answers == Some(&Answers::Taken) {
                    since = now;
                }
            }
        }
    }
}
