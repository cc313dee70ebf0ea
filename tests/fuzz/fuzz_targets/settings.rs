//! What a person writes: a plugin's NAME.toml, and the settings of the daemon, whose errors must not contain a
//! password.

#![cfg_attr(fuzzing, no_main)]

use clap::{Args as _, FromArgMatches as _};
use tidings::config::RunArgs;
use tidings::plugins::Settings;

/// The middle of each password, by which a leak is noticed.
const SECRET: &str = "S3CRET";
/// The flags that get lines of the input as their values.
const FLAGS: [&str; 11] = [
    "exchange",
    "queue-type",
    "replay-max",
    "plugin-dir",
    "http-addr",
    "sweep-ms",
    "replay-interval-ms",
    "max-attempts",
    "drain-rate",
    "notify",
    "history-days",
];

tidings_fuzz::target!(try_settings);

fn try_settings(bytes: &[u8]) {
    let [mode, bytes @ ..] = bytes else { return };
    let Ok(text) = str::from_utf8(bytes) else { return };
    if mode & 1 == 0 { try_plugin_settings(text) } else { try_daemon_settings(text, mode & 2 == 0) }
}

fn try_plugin_settings(text: &str) {
    match Settings::parse(text) {
        Ok(Settings { limits, .. }) => {
            assert!((10..=60_000).contains(&limits.cpu_ms) && (10..=60_000).contains(&limits.wall_ms));
            assert!((1..=4_096).contains(&limits.memory_mib) && (1..=131_072).contains(&limits.output_kib));
        }
        Err(reason) => assert!(reason.contains(" at line ") || reason.starts_with("[limits] "), "{reason}"),
    }
}

fn try_daemon_settings(text: &str, with_password: bool) {
    if text.contains(SECRET) {
        return;
    }
    let mut lines = text.split('\n');
    let mut url = |scheme: &str| {
        let (before, after) = lines.next().unwrap_or_default().split_once('\t').unwrap_or_default();
        if with_password {
            format!("{scheme}://user:{before}{SECRET}@{after}")
        } else {
            format!("{scheme}://{before}{after}")
        }
    };
    let (database_url, amqp_url) = (url("postgres"), url("amqp"));
    let urls = [format!("--database-url={database_url}"), format!("--amqp-url={amqp_url}")];
    let other_flags = FLAGS.iter().zip(lines).map(|(flag, value)| format!("--{flag}={value}"));
    let command = RunArgs::augment_args(clap::Command::new("run").no_binary_name(true));
    let Ok(matches) = command.try_get_matches_from(urls.into_iter().chain(other_flags)) else { return };
    let args = RunArgs::from_arg_matches(&matches).expect("clap has parsed them");
    match args.check() {
        Ok(config) => {
            assert!((1..=200).contains(&config.servers.broker.exchange.len()) && config.max_attempts > 0);
            assert!(!format!("{config:?}").contains(SECRET));
        }
        Err(mistakes) => {
            assert!(mistakes.iter().count() > 0);
            for sentence in mistakes.iter() {
                assert!(sentence.starts_with("TIDINGS_"), "{sentence}");
                assert!(!sentence.contains(SECRET), "{sentence}");
            }
        }
    }
}
