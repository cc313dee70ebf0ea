//! Tests of recurrences: that daemons make one occurrence for each nominal instant, also if they are killed, and which instants
//! those are.

pub(crate) mod catching_up;
pub(crate) mod changing;
pub(crate) mod making;
pub(crate) mod many;
pub(crate) mod oracle;
pub(crate) mod rules;
