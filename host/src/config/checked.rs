//! The settings after their check: every value is within its limits. Must never hold a value as it was typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::broker::BrokerSettings;
use crate::intake::request::Rules;
use crate::model::secrets::{HttpToken, SecretUrl};
use crate::store::Settling;
use crate::telemetry::{LogFormat, TraceSettings};

/// The settings of both servers, checked.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// `TIDINGS_DATABASE_URL`
    pub database_url: SecretUrl,
    /// `TIDINGS_AMQP_URL`, `TIDINGS_EXCHANGE`, `TIDINGS_QUEUE_TYPE` and `TIDINGS_INTAKE`.
    pub broker: BrokerSettings,
    /// `TIDINGS_REPLAY_MAX`, 0 to 1,000,000; default 0. How often a dead letter may be replayed; 0 = no limit.
    pub replay_max: u32,
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` and others; `None`, the default = no traces.
    pub traces: Option<TraceSettings>,
}

/// The settings of `tidings run`, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The addresses of both servers.
    pub servers: ServerSettings,
    /// `TIDINGS_DATABASE_CONNECTIONS`, 4 to 100; default 13: three for lanes, and one each for a fourth lane in a
    /// backlog, the look, holding rows, releasing them, history, the canary, HTTP, the page, notifications and a pass.
    pub database_connections: usize,
    /// `TIDINGS_PLUGIN_DIR`; for the daemon, an existing directory.
    pub plugin_dir: PathBuf,
    /// `TIDINGS_STATE_DIR`
    pub state_dir: PathBuf,
    /// `TIDINGS_HTTP_ADDR`; port 0 = any free port.
    pub http_addr: SocketAddr,
    /// `TIDINGS_MANAGEMENT_URL`; `None`, the default = policies, bindings and alarms, which AMQP does not show, are not
    /// checked.
    pub management_url: Option<SecretUrl>,
    /// `TIDINGS_HTTP_TOKEN`; `None`, the default = the page is read-only.
    pub http_token: Option<HttpToken>,
    /// `TIDINGS_INTAKE_MAX_BODY`, 1 byte to 8 MiB; default 1 MiB; and `TIDINGS_INTAKE_KINDS`, by default all.
    pub intake_rules: Rules,
    /// `TIDINGS_INTAKE_RATE`, messages a second for each intake, at most a million; `None`, the default = as many as come.
    pub intake_rate: Option<u32>,
    /// `TIDINGS_SWEEP_MS`, 10 ms to an hour; default 5 s.
    pub sweep: Duration,
    /// `TIDINGS_REPLAY_INTERVAL_MS`, 1 s to a day; default 15 minutes.
    pub replay_interval: Duration,
    /// `TIDINGS_MAX_ATTEMPTS`, at least 1; default 20. A row whose plugin has failed so often is parked.
    pub max_attempts: u32,
    /// `TIDINGS_DRAIN_RATE`, late rows a second, at most a million; `None`, the default = as many as RabbitMQ takes.
    pub drain_rate: Option<u32>,
    /// `TIDINGS_NOTIFY`
    pub notify: bool,
    /// `TIDINGS_CANARY_MS`, at most a day; `None`, the default = no canary.
    pub canary: Option<Duration>,
    /// `TIDINGS_ADOPT`, 0 or 1; default 0. Deliver although the database may be a copy.
    pub adopt: bool,
    /// `TIDINGS_LOG`
    pub log: LogFormat,
    /// `TIDINGS_HISTORY_DAYS`, 0 to 36,500; default 7. Older history is removed; 0 = none is written either.
    pub history_age: Duration,
    /// `TIDINGS_HISTORY`, default all, and `TIDINGS_SYNCHRONOUS_COMMIT`, default on.
    pub settling: Settling,
}
