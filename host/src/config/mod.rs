//! The settings: flags or `TIDINGS_*` variables, and `OTEL_*` variables for traces. They are read once, at the start.
//!
//! Must never show a password: neither an error nor a `Debug` of the settings contains one.
//!
//! To change it, know: a setting is a field of [`RunArgs`] with its variable, a check in `RunArgs::validate`, a field
//! of [`Config`] (`checked.rs`) and a line in docs/reference.md, which a test compares with the settings. All errors are reported
//! together, each as a sentence that begins with the variable. A variable that begins with `TIDINGS_` and is not a
//! setting is an error.

mod checked;
mod traces;
mod validation;
mod variables;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use validation::{check_url, parse_number, parse_word};
use variables::check_names;

use crate::broker::{BrokerSettings, Management, QueueType};
use crate::intake::request::Rules;
use crate::model::intake::Intake;
use crate::model::secrets::HttpToken;
use crate::model::secrets::SecretUrl;
use crate::store::{History, Settling};
use crate::telemetry::LogFormat;

pub use checked::{Config, ServerSettings};
pub use validation::ValidationErrors;
pub(crate) use variables::find_service_links;

/// The largest value of `TIDINGS_INTAKE_MAX_BODY`: in base64, and with its headers, such a body fits into a payload.
const MAX_INTAKE_BODY: u32 = 8 * 1024 * 1024;

/// The address of the database: all that `tidings migrate` needs.
#[derive(Args, Clone, Debug)]
pub struct DatabaseArgs {
    /// Where PostgreSQL is, such as `postgres://user:password@host/database`
    #[arg(long, env = "TIDINGS_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

/// The directory in which the daemon keeps its state.
#[derive(Args, Clone, Debug)]
pub struct StateArgs {
    /// A private directory for compiled plugins and the last good version of each [default: `$STATE_DIRECTORY`,
    /// `$XDG_STATE_HOME/tidings`, or `~/.local/state/tidings`]
    #[arg(long, env = "TIDINGS_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// The address of the daemon's HTTP interface.
#[derive(Args, Clone, Debug)]
pub struct HttpArgs {
    /// The address and port of the daemon's HTTP interface
    #[arg(long, env = "TIDINGS_HTTP_ADDR", value_name = "ADDR:PORT", default_value = "127.0.0.1:7070")]
    http_addr: String,
}

/// The address of RabbitMQ and the daemon's exchange and queues: all that `tidings topology` needs.
#[derive(Args, Clone, Debug)]
pub struct BrokerArgs {
    /// Where RabbitMQ is, such as `amqp://user:password@host/vhost`
    #[arg(long, env = "TIDINGS_AMQP_URL", hide_env_values = true, value_name = "URL")]
    amqp_url: Option<String>,
    /// The exchange to publish to; the dead-letter exchange and the daemon's queues are named after it
    #[arg(long, env = "TIDINGS_EXCHANGE", value_name = "NAME", default_value = "tidings")]
    exchange: String,
    /// The type of the daemon's own queues, classic or quorum
    #[arg(long, env = "TIDINGS_QUEUE_TYPE", value_name = "TYPE", default_value = "classic")]
    queue_type: String,
    /// Exchanges whose messages become rows, and the exchanges to which they go when they are due, such as
    /// `orders.delayed=orders`
    #[arg(long, env = "TIDINGS_INTAKE", value_name = "FROM=TO,...")]
    intake: Option<String>,
}

/// The addresses of both servers: all that the commands for dead letters and parked rows need.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    broker: BrokerArgs,
    /// How often a dead letter may be replayed before it is parked; 0 = as often as it takes
    #[arg(long, env = "TIDINGS_REPLAY_MAX", value_name = "N", default_value = "0")]
    replay_max: String,
}

/// The settings of `tidings run`, as they were typed.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    servers: ServerArgs,
    /// The directory with the plugins, one .wasm file each
    #[arg(long, env = "TIDINGS_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: Option<String>,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    http: HttpArgs,
    /// The longest body that an intake takes, in bytes
    #[arg(long, env = "TIDINGS_INTAKE_MAX_BODY", value_name = "BYTES", default_value = "1048576")]
    intake_max_body: String,
    /// The kinds that messages to an intake may name in tidings-kind, such as `mail,invoice`; without it all
    #[arg(long, env = "TIDINGS_INTAKE_KINDS", value_name = "KIND,...")]
    intake_kinds: Option<String>,
    /// How many messages a second each intake takes at most; 0 = as many as come
    #[arg(long, env = "TIDINGS_INTAKE_RATE", value_name = "N", default_value = "0")]
    intake_rate: String,
    /// The most connections to PostgreSQL that the daemon keeps, at least 4
    #[arg(long, env = "TIDINGS_DATABASE_CONNECTIONS", value_name = "N", default_value = "13")]
    database_connections: String,
    /// The longest time between two looks at the queue, in milliseconds
    #[arg(long, env = "TIDINGS_SWEEP_MS", value_name = "MS", default_value = "5000")]
    sweep_ms: String,
    /// The time from one pass over the dead letters to the next, in milliseconds
    #[arg(long, env = "TIDINGS_REPLAY_INTERVAL_MS", value_name = "MS", default_value = "900000")]
    replay_interval_ms: String,
    /// Where RabbitMQ's management API is, such as `http://user:password@host:15672`: policies, bindings and alarms are
    /// seen there
    #[arg(long, env = "TIDINGS_MANAGEMENT_URL", hide_env_values = true, value_name = "URL")]
    management_url: Option<String>,
    /// The token that a person needs to act on the page: 16 to 256 printable ASCII characters; without it the page is
    /// read-only
    #[arg(long, env = "TIDINGS_HTTP_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    http_token: Option<HttpToken>,
    /// How often a row may make its plugin fail before it is parked
    #[arg(long, env = "TIDINGS_MAX_ATTEMPTS", value_name = "N", default_value = "20")]
    max_attempts: String,
    /// How many late rows a second are delivered at most, after an outage for instance; 0 = as many as RabbitMQ takes
    #[arg(long, env = "TIDINGS_DRAIN_RATE", value_name = "N", default_value = "0")]
    drain_rate: String,
    /// Listen for notifications (on), or only look every sweep (off)
    #[arg(long, env = "TIDINGS_NOTIFY", value_name = "on|off", default_value = "on")]
    notify: String,
    /// The time from one canary (a row of the daemon's own through the whole path) to the next, in milliseconds; 0 =
    /// none
    #[arg(long, env = "TIDINGS_CANARY_MS", value_name = "MS", default_value = "0")]
    canary_ms: String,
    /// Deliver from this database although it is a copy, and daemons serve its origin (1), or not (0)
    #[arg(long, env = "TIDINGS_ADOPT", value_name = "0|1", default_value = "0")]
    adopt: String,
    /// How the log is written: text, or json, an object a line
    #[arg(long, env = "TIDINGS_LOG", value_name = "text|json", default_value = "text")]
    log: String,
    /// How many days of history to keep; 0 = write none
    #[arg(long, env = "TIDINGS_HISTORY_DAYS", value_name = "DAYS", default_value = "7")]
    history_days: String,
    /// Which rows are kept in the history: all, or those that were not delivered (undelivered)
    #[arg(long, env = "TIDINGS_HISTORY", value_name = "all|undelivered", default_value = "all")]
    history: String,
    /// Wait until the end of a delivery is on PostgreSQL's disk (on), or not (off): then a crash of PostgreSQL may bring
    /// messages a second time, and loses none
    #[arg(long, env = "TIDINGS_SYNCHRONOUS_COMMIT", value_name = "on|off", default_value = "on")]
    synchronous_commit: String,
}

/// The settings of `tidings doctor`, as they were typed: those of the daemon.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    run: RunArgs,
}

impl DatabaseArgs {
    /// Checks the setting.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<SecretUrl, ValidationErrors> {
        let mut errors = check_names();
        let url = self.validate(&mut errors);
        url.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }

    fn validate(self, errors: &mut Vec<String>) -> Option<SecretUrl> {
        check_url("TIDINGS_DATABASE_URL", self.database_url, &["postgres://", "postgresql://"], errors, |url| {
            crate::store::check_url(url)
        })
    }
}

impl BrokerArgs {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<BrokerSettings, ValidationErrors> {
        let mut errors = check_names();
        let settings = self.validate(&mut errors);
        settings.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }

    fn validate(self, errors: &mut Vec<String>) -> Option<BrokerSettings> {
        let url = check_url("TIDINGS_AMQP_URL", self.amqp_url, &["amqp://", "amqps://"], errors, |url| {
            crate::broker::check_url(url)
        });
        let exchange = self.exchange;
        if !(1..=200).contains(&exchange.len()) || exchange.starts_with("amq.") {
            errors.push(format!(
                "TIDINGS_EXCHANGE is {exchange:?}, which is not a name of 1 to 200 bytes outside RabbitMQ's own amq.*"
            ));
        }
        let types = [("classic", QueueType::Classic), ("quorum", QueueType::Quorum)];
        let queue_type = parse_word("TIDINGS_QUEUE_TYPE", &self.queue_type, types, errors);
        let intakes = match Intake::parse_list(self.intake.as_deref().unwrap_or_default(), &exchange) {
            Ok(intakes) => Some(intakes.into_iter().map(Arc::new).collect()),
            Err(sentences) => {
                errors
                    .extend(sentences.into_iter().map(|sentence| format!("TIDINGS_INTAKE cannot be used: {sentence}")));
                None
            }
        };
        Some(BrokerSettings { url: url?, exchange, queue_type: queue_type?, intakes: intakes? })
    }
}

impl ServerArgs {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<ServerSettings, ValidationErrors> {
        let mut errors = check_names();
        let settings = self.validate(&mut errors);
        settings.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }

    fn validate(self, errors: &mut Vec<String>) -> Option<ServerSettings> {
        let database_url = self.database.validate(errors);
        let broker = self.broker.validate(errors);
        let replay_max = parse_number("TIDINGS_REPLAY_MAX", &self.replay_max, 0, 1_000_000, errors);
        let traces = traces::read_settings(|name| std::env::var(name).ok(), errors);
        Some(ServerSettings { database_url: database_url?, broker: broker?, replay_max: replay_max?, traces })
    }
}

impl StateArgs {
    /// The given directory, or else the default: that of a systemd unit, or else that of the user.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        (self.state_dir.clone().filter(|dir| !dir.as_os_str().is_empty()))
            .or_else(|| variable("STATE_DIRECTORY"))
            .or_else(|| variable("XDG_STATE_HOME").map(|dir| dir.join("tidings")))
            .or_else(|| variable("HOME").map(|dir| dir.join(".local/state/tidings")))
            .unwrap_or_else(|| "/var/lib/tidings".into())
    }
}

impl HttpArgs {
    /// Checks the setting.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<SocketAddr, ValidationErrors> {
        let mut errors = check_names();
        let addr = self.validate(&mut errors);
        addr.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }

    fn validate(self, errors: &mut Vec<String>) -> Option<SocketAddr> {
        let addr = self.http_addr.parse().ok();
        if addr.is_none() {
            errors.push(format!(
                "TIDINGS_HTTP_ADDR is {:?}, which is not an address and a port, such as 127.0.0.1:7070 or [::]:7070",
                self.http_addr
            ));
        }
        addr
    }
}

impl RunArgs {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<Config, ValidationErrors> {
        let mut errors = check_names();
        if let Some(dir) = self.given_plugin_dir().filter(|dir| !dir.is_dir()) {
            errors.push(format!("TIDINGS_PLUGIN_DIR is {}, which is not a directory", dir.display()));
        }
        let config = self.validate(&mut errors);
        config.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }

    fn given_plugin_dir(&self) -> Option<PathBuf> {
        self.plugin_dir.as_deref().filter(|dir| !dir.is_empty()).map(PathBuf::from)
    }

    /// Validates the settings, but not whether the directories that they name exist.
    fn validate(self, errors: &mut Vec<String>) -> Option<Config> {
        let plugin_dir = self.given_plugin_dir();
        if plugin_dir.is_none() {
            errors.push("TIDINGS_PLUGIN_DIR is not set: give the directory with the plugins".into());
        }
        let servers = self.servers.validate(errors);
        let state_dir = self.state.dir();
        if plugin_dir.as_deref().is_some_and(|plugins| state_dir.starts_with(plugins)) {
            errors.push(format!(
                "TIDINGS_STATE_DIR is {}, inside TIDINGS_PLUGIN_DIR, where authors of plugins may write: give another one",
                state_dir.display()
            ));
        }
        let http_addr = self.http.validate(errors);
        let management_url = self.management_url.filter(|url| !url.is_empty()).and_then(|given| {
            check_url("TIDINGS_MANAGEMENT_URL", Some(given), &["http://", "https://"], errors, |url| {
                Management::new(url).map(drop)
            })
        });
        let http_token = self.http_token.filter(|token| !token.is_empty());
        if let Some(error) = http_token.as_ref().and_then(HttpToken::find_error) {
            errors.push(format!("TIDINGS_HTTP_TOKEN {error}"));
        }
        let max_body = parse_number("TIDINGS_INTAKE_MAX_BODY", &self.intake_max_body, 1, MAX_INTAKE_BODY, errors);
        let intake_rate = parse_number("TIDINGS_INTAKE_RATE", &self.intake_rate, 0, 1_000_000, errors);
        let kinds =
            self.intake_kinds.as_deref().map(|kinds| kinds.split(',').map(str::trim).filter(|kind| !kind.is_empty()));
        let intake_kinds = kinds.map(|kinds| kinds.map(str::to_owned).collect());
        let switch = [("on", true), ("off", false)];
        let notify = parse_word("TIDINGS_NOTIFY", &self.notify, switch, errors);
        let connections = &self.database_connections;
        let database_connections = parse_number("TIDINGS_DATABASE_CONNECTIONS", connections, 4, 100, errors);
        let sweep_ms = parse_number("TIDINGS_SWEEP_MS", &self.sweep_ms, 10, 3_600_000, errors);
        let interval = &self.replay_interval_ms;
        let replay_interval_ms = parse_number("TIDINGS_REPLAY_INTERVAL_MS", interval, 1_000, 86_400_000, errors);
        let max_attempts = parse_number("TIDINGS_MAX_ATTEMPTS", &self.max_attempts, 1, 1_000_000, errors);
        let drain_rate = parse_number("TIDINGS_DRAIN_RATE", &self.drain_rate, 0, 1_000_000, errors);
        let canary_ms = parse_number("TIDINGS_CANARY_MS", &self.canary_ms, 0, 86_400_000, errors);
        let adopt = parse_word("TIDINGS_ADOPT", &self.adopt, [("0", false), ("1", true)], errors);
        let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
        let log = parse_word("TIDINGS_LOG", &self.log, formats, errors);
        let histories = [("all", History::All), ("undelivered", History::Undelivered)];
        let history = parse_word("TIDINGS_HISTORY", &self.history, histories, errors);
        let history_days = parse_number("TIDINGS_HISTORY_DAYS", &self.history_days, 0, 36_500, errors);
        let synchronous_commit = parse_word("TIDINGS_SYNCHRONOUS_COMMIT", &self.synchronous_commit, switch, errors);

        Some(Config {
            servers: servers?,
            database_connections: database_connections? as usize,
            plugin_dir: plugin_dir?,
            state_dir,
            http_addr: http_addr?,
            management_url,
            http_token,
            intake_rules: Rules { max_body: max_body? as usize, kinds: intake_kinds },
            intake_rate: Some(intake_rate?).filter(|rate| *rate > 0),
            sweep: Duration::from_millis(sweep_ms?.into()),
            replay_interval: Duration::from_millis(replay_interval_ms?.into()),
            max_attempts: max_attempts?,
            drain_rate: Some(drain_rate?).filter(|rate| *rate > 0),
            notify: notify?,
            canary: Some(Duration::from_millis(canary_ms?.into())).filter(|interval| !interval.is_zero()),
            adopt: adopt?,
            log: log?,
            history_age: Duration::from_secs(u64::from(history_days?) * 24 * 60 * 60),
            settling: Settling {
                history: if history_days? == 0 { History::None } else { history? },
                synchronous_commit: synchronous_commit?,
            },
        })
    }
}

impl DoctorArgs {
    /// Checks the settings. A missing plugin directory is no error here: the doctor reports it.
    ///
    /// # Errors
    ///
    /// All errors in the settings.
    pub fn check(self) -> Result<Config, ValidationErrors> {
        let mut errors = check_names();
        let config = self.run.validate(&mut errors);
        config.filter(|_| errors.is_empty()).ok_or(ValidationErrors(errors))
    }
}

#[cfg(test)]
mod tests;
