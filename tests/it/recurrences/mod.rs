//! Tests of recurrences: that an occurrence is made once for each nominal instant, whatever is killed, and which instants those
//! are.

pub(crate) mod catching_up;
pub(crate) mod changing;
pub(crate) mod making;
pub(crate) mod many;
pub(crate) mod oracle;
pub(crate) mod rules;
