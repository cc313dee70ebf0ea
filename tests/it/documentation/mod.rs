//! What the documentation says is so: its commands run, its names exist, and its example consumers do what they should.

pub(crate) mod consumers;
pub(crate) mod docs;
pub(crate) mod names;
