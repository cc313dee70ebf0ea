//! The behaviour of Tidings, against real servers. One file per area; the names are what users may rely on.

mod author;
mod breaker;
mod by_hand;
mod consumers;
mod contract;
mod crash;
mod delivery;
mod doctor;
mod faults;
mod health;
mod hostile;
mod languages;
mod letters;
mod metrics;
mod outcomes;
mod passes;
mod plugins;
mod process;
mod queries;
mod reload;
mod replay;
mod scenario;
mod soak;
mod sql;
mod unfit;
mod waking;
