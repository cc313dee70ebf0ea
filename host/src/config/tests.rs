//! What the settings accept, and that no error shows a secret.

use std::sync::Arc;

use proptest::prelude::*;

use crate::broker::Broker;
use crate::config::*;
use crate::model::wake::Wake;
use crate::store::Store;

const DATABASE_URL: &str = "postgres://user:password@localhost/database";
const AMQP_URL: &str = "amqp://user:password@localhost/vhost";

/// The settings with these values, in the order of the variables below.
fn run_args(values: &[&str; VARIABLES.len()]) -> RunArgs {
    let [database_url, amqp_url, exchange, queue_type, replay_max, plugin_dir, http_addr, rest @ ..] =
        values.map(str::to_owned);
    let [sweep_ms, replay_interval_ms, max_attempts, notify, canary_ms, log, rest @ ..] = rest;
    let [
        history_days,
        http_token,
        history,
        synchronous_commit,
        adopt,
        intake,
        intake_max_body,
        intake_rate,
        drain_rate,
    ] = rest;
    RunArgs {
        servers: ServerArgs {
            database: DatabaseArgs { database_url: Some(database_url) },
            broker: BrokerArgs { amqp_url: Some(amqp_url), exchange, queue_type, intake: Some(intake) },
            replay_max,
        },
        plugin_dir: Some(plugin_dir),
        database_connections: "13".into(),
        state: StateArgs { state_dir: Some("/var/lib/tidings".into()) },
        http: HttpArgs { http_addr },
        management_url: None,
        http_token: Some(http_token.into()),
        intake_max_body,
        intake_kinds: None,
        intake_rate,
        sweep_ms,
        replay_interval_ms,
        max_attempts,
        drain_rate,
        notify,
        canary_ms,
        log,
        history_days,
        history,
        synchronous_commit,
        adopt,
    }
}

/// The variables that can be wrong, each with a good value.
const VARIABLES: [(&str, &str); 22] = [
    ("TIDINGS_DATABASE_URL", DATABASE_URL),
    ("TIDINGS_AMQP_URL", AMQP_URL),
    ("TIDINGS_EXCHANGE", "tidings"),
    ("TIDINGS_QUEUE_TYPE", "quorum"),
    ("TIDINGS_REPLAY_MAX", "0"),
    ("TIDINGS_PLUGIN_DIR", "."),
    ("TIDINGS_HTTP_ADDR", "[::1]:0"),
    ("TIDINGS_SWEEP_MS", "10"),
    ("TIDINGS_REPLAY_INTERVAL_MS", "86400000"),
    ("TIDINGS_MAX_ATTEMPTS", "1"),
    ("TIDINGS_NOTIFY", "off"),
    ("TIDINGS_CANARY_MS", "60000"),
    ("TIDINGS_LOG", "json"),
    ("TIDINGS_HISTORY_DAYS", "36500"),
    ("TIDINGS_HTTP_TOKEN", "0123456789abcdef"),
    ("TIDINGS_HISTORY", "undelivered"),
    ("TIDINGS_SYNCHRONOUS_COMMIT", "off"),
    ("TIDINGS_ADOPT", "1"),
    ("TIDINGS_INTAKE", "orders.delayed=orders"),
    ("TIDINGS_INTAKE_MAX_BODY", "8388608"),
    ("TIDINGS_INTAKE_RATE", "1000000"),
    ("TIDINGS_DRAIN_RATE", "1000000"),
];

#[test]
fn all_errors_are_reported_at_once_each_with_its_variable() {
    let errors = run_args(&["amq.?"; VARIABLES.len()]).check().expect_err("no value can be used");
    for (name, _) in VARIABLES {
        assert!(errors.iter().any(|sentence| sentence.starts_with(&format!("{name} "))), "{name}: {errors}");
    }
}

#[test]
fn a_state_directory_inside_the_directory_of_plugins_is_refused() {
    let values = VARIABLES.map(|(name, good)| if name == "TIDINGS_PLUGIN_DIR" { "/" } else { good });
    let errors = run_args(&values).check().expect_err("every directory is inside the root");
    let refused = |sentence: &str| sentence.contains("inside TIDINGS_PLUGIN_DIR");
    assert!(errors.iter().any(refused), "{errors}");
}

proptest! {
    #[test]
    fn any_values_give_settings_within_their_limits_or_errors_that_name_the_variables(
        odd in proptest::collection::vec((0..VARIABLES.len(), ".{0,40}|[0-9]{0,11}|(postgres|amqp)://\\PC{0,40}"), 0..4),
    ) {
        let mut values = VARIABLES.map(|(_, value)| value);
        for (at, value) in &odd {
            values[*at] = value;
        }
        // Unknown variables in the environment of the tests are reported as well.
        let unknown = check_names().len();
        match run_args(&values).check() {
            Ok(config) => {
                let Config { servers, sweep, replay_interval, max_attempts, history_age, settling, .. } = config;
                prop_assert!((1..=200).contains(&servers.broker.exchange.len()));
                prop_assert!(servers.replay_max <= 1_000_000 && (1..=1_000_000).contains(&max_attempts));
                prop_assert!((Duration::from_millis(10)..=Duration::from_hours(1)).contains(&sweep));
                prop_assert!((Duration::from_secs(1)..=Duration::from_hours(24)).contains(&replay_interval));
                prop_assert!(history_age <= Duration::from_hours(24 * 36_500));
                prop_assert_eq!(history_age.is_zero(), settling.history == History::None);
            }
            Err(ValidationErrors(sentences)) => {
                prop_assert!(unknown > 0 || odd.iter().any(|(at, value)| values[*at] == value));
                for sentence in &sentences[unknown..] {
                    // The first variable named may be another one: `TIDINGS_STATE_DIR` is not inside a
                    // directory of plugins until that is `/`.
                    let names_an_odd_one = VARIABLES
                        .iter()
                        .zip(values)
                        .any(|((name, good), value)| value != *good && sentence.split([' ', ',']).any(|word| word == *name));
                    prop_assert!(names_an_odd_one, "{}", sentence);
                }
            }
        }
    }

    #[test]
    fn no_output_contains_a_password(
        before in "[a-z0-9/?#@:%&=+ .\\[\\]-]{0,4}",
        after in "[a-z0-9/?#@:%&=+ .\\[\\]-]{0,4}",
        rest in "|/|/vhost|/vhost\\?heartbeat=5|:5/d|:99999/d",
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let _entered = runtime.enter();
        let url = |scheme: &str| format!("{scheme}://user:{before}SECRET{after}@host{rest}");
        let (database_url, amqp_url, token) = (url("postgres"), url("amqp"), format!("{before}SECRET{after}{rest}"));
        let mut values = VARIABLES.map(|(_, value)| value);
        for (at, value) in [(0, &database_url), (1, &amqp_url), (14, &token)] {
            values[at] = value;
            let shown = match run_args(&values).check() {
                Ok(config) => {
                    let store = Store::new(&config.servers.database_url, 1);
                    let broker = Broker::new(&config.servers.broker, Arc::new(Wake::default()));
                    format!("{config:?} {} {}", store.place(), broker.place())
                }
                Err(errors) => errors.to_string(),
            };
            prop_assert!(!shown.contains("SECRET"), "{}", shown);
            values[at] = VARIABLES[at].1;
        }
    }
}
