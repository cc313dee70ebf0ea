//! The behaviour of Tidings, against real servers. One file per area; the names are what users may rely on.

mod author;
mod breaker;
mod contract;
mod delivery;
mod hostile;
mod languages;
mod outcomes;
mod plugins;
mod process;
mod queries;
mod reload;
mod replay;
mod sql;
mod waking;
