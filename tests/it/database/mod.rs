//! Tests of the SQL interface, and of the databases on which the daemon runs.

pub(crate) mod copies;
pub(crate) mod failover;
pub(crate) mod few_connections;
pub(crate) mod hosts;
pub(crate) mod imposed;
pub(crate) mod locks;
pub(crate) mod partitions;
pub(crate) mod platforms;
pub(crate) mod sql;
pub(crate) mod unfit;
pub(crate) mod upgrade;
