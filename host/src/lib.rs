#![doc = include_str!("../ARCHITECTURE.md")]

// In the order of reading: the edge of the process, the loops, the nouns, the servers, the plugins.
pub mod cli;
pub mod config;
pub mod daemon;
pub mod health;
pub mod http;
pub mod lifecycle;
pub mod telemetry;

pub mod by_hand;
pub mod canary;
pub mod delivery;
pub mod flood;
pub mod held;
pub mod keeper;
pub mod listener;
pub mod replayer;
pub mod scheduler;
pub mod wake;

pub mod backoff;
pub mod causes;
pub mod clock;
pub mod dead_letter;
pub mod event;
pub mod http_token;
pub mod message;
pub mod schedule;
pub mod secret_url;
mod trust;
pub mod unfinished;
pub mod whereabouts;
pub mod words;

pub mod broker;
pub mod plugins;
pub mod store;
