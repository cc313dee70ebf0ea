//! Tests of plugins: they are added, replaced and removed while the daemon runs, and no plugin harms rows of another.

pub(crate) mod allowlist;
pub(crate) mod authoring;
pub(crate) mod breaker;
pub(crate) mod contract;
pub(crate) mod hostile;
pub(crate) mod languages;
pub(crate) mod reload;
pub(crate) mod serving;
pub(crate) mod state;
