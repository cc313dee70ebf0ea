//! Tests of what operators see and do: commands, health, metrics, logs, traces, the page, pauses, TLS, starting and
//! stopping.

pub(crate) mod collectors;
pub(crate) mod commands;
pub(crate) mod doctor;
pub(crate) mod environment;
pub(crate) mod explain;
pub(crate) mod health;
pub(crate) mod loopback;
pub(crate) mod metrics;
pub(crate) mod nodes;
pub(crate) mod page;
pub(crate) mod page_api;
pub(crate) mod page_intakes;
pub(crate) mod page_lateness;
pub(crate) mod page_recurrences;
pub(crate) mod pause;
pub(crate) mod process;
pub(crate) mod tls;
pub(crate) mod traces;
pub(crate) mod unread_log;
