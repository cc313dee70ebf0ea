//! The SQL interface, and the databases that the daemon runs on.

pub(crate) mod few_connections;
pub(crate) mod platforms;
pub(crate) mod sql;
pub(crate) mod unfit;
