//! The behaviour of Tidings, against real servers. One file per area; the names are what users may rely on.

mod delivery;
mod outcomes;
mod plugins;
mod process;
mod queries;
mod sql;
mod waking;
