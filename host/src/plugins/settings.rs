//! `NAME.toml` beside `NAME.wasm`: the plugin's own configuration and its limits. A broken one is a refused plugin: half
//! a configuration would be worse.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::limits::Limits;

/// What NAME.toml may say.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Settings {
    /// What `host.config` returns.
    pub(super) config: BTreeMap<String, String>,
    /// What the plugin may use.
    pub(super) limits: Limits,
}

impl Settings {
    /// Understands the text of the file.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.limits.mistake().map_or(Ok(settings), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_has_the_default() {
        assert_eq!(Settings::parse(""), Ok(Settings::default()));
        let settings = Settings::parse("[config]\ncurrency = \"EUR\"\n[limits]\ncpu-ms = 500\n").expect("settings");
        assert_eq!(settings.config["currency"], "EUR");
        assert_eq!(settings.limits, Limits { cpu_ms: 500, ..Limits::default() });
    }

    #[test]
    fn what_is_misspelt_of_another_type_or_out_of_range_is_named() {
        for (text, named) in [
            ("[limits]\ncpu_ms = 5", "cpu_ms"),
            ("[limit]", "limit"),
            ("[config]\na = 1", "invalid type"),
            ("[limits]\nwall-ms = 0", "wall-ms is 0, not a number from 10 to 60000"),
            ("[", "TOML"),
        ] {
            let reason = Settings::parse(text).expect_err(text);
            assert!(reason.contains(named), "{reason}");
        }
    }
}
