//! Tests of the documentation: its commands run, the names in it exist, and its example consumers work.

pub(crate) mod consumers;
pub(crate) mod docs;
pub(crate) mod names;
