//! Tests that rows are delivered milliseconds after they are due, even if notifications are lost, at a cost that does
//! not grow with the number of rows.

pub(crate) mod assumptions;
pub(crate) mod backlog;
pub(crate) mod clocks;
pub(crate) mod delivery;
pub(crate) mod low_water;
pub(crate) mod polling;
pub(crate) mod queries;
pub(crate) mod waking;
