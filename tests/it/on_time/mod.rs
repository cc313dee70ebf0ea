//! When rows are delivered: milliseconds after they are due, whatever got lost on the way, and at a cost that does not grow.

pub(crate) mod assumptions;
pub(crate) mod delivery;
pub(crate) mod low_water;
pub(crate) mod polling;
pub(crate) mod queries;
pub(crate) mod waking;
