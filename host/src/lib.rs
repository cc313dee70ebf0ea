#![doc = include_str!("../ARCHITECTURE.md")]

// In reading order: each module uses only modules that stand below it.
pub mod cli;
pub mod daemon;
pub mod http;

pub mod config;
pub mod dead_letters;
pub mod fleet;
pub mod intake;
pub mod scheduler;

pub mod recurrences;

pub mod plugins;
pub mod telemetry;

pub mod store;

pub mod broker;

pub mod model;
