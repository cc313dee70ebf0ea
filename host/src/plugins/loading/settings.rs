//! `NAME.toml` beside `NAME.wasm`: the plugin's own configuration and its limits. A broken one is a refused plugin: half
//! a configuration would be worse.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::plugins::runtime::limits::Limits;

/// What NAME.toml may say.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What `host.config` returns.
    pub config: BTreeMap<String, String>,
    /// What the plugin may use.
    pub limits: Limits,
}

impl Settings {
    /// Understands the text of the file.
    ///
    /// # Errors
    ///
    /// With what is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.limits.mistake().map_or(Ok(settings), Err)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    #[test]
    fn tables_in_tables_without_end_are_refused_and_cost_no_stack() {
        for (part, text) in
            [("[", "a = "), ("{a=", "a = "), ("a.", ""), ("[a.", ""), ("[[a.", ""), ("[a]\n[a.a]\n", "")]
        {
            let text = [text, &part.repeat(64 * 1024 / part.len())].concat();
            let reason = Settings::parse(&text).expect_err(part);
            assert!(reason.contains("line"), "{part}");
        }
    }

    /// Lines that are settings, or look like it.
    fn lines() -> impl Strategy<Value = String> {
        let number = prop_oneof![(0..200_000_u64).prop_map(|number| number.to_string()), "-?[0-9a-z_.\"]{1,25}"];
        let line = prop_oneof![
            "\\[(config|limits)\\]",
            ("(cpu-ms|wall-ms|memory-mib|output-kib)", number).prop_map(|(name, number)| format!("{name} = {number}")),
            "[a-z.-]{1,9} = \"[ -~]{0,9}\"",
            "[\\[\\]{}a-z.,='\"#\\\\ -]{0,20}",
        ];
        proptest::collection::vec(line, 0..7).prop_map(|lines| lines.join("\n"))
    }

    /// Limits, each within its own or not.
    fn limits() -> impl Strategy<Value = String> {
        let number = prop_oneof![0..20_u64, 4_090..4_100_u64, 59_990..60_010_u64, 131_070..131_075_u64, any::<u64>()];
        let names = proptest::sample::subsequence(vec!["cpu-ms", "wall-ms", "memory-mib", "output-kib"], 0..3);
        (names, [number.clone(), number.clone(), number]).prop_map(|(names, numbers)| {
            let lines = names.iter().zip(numbers).map(|(name, number)| format!("{name} = {number}\n"));
            ["[limits]\n".to_owned()].into_iter().chain(lines).collect()
        })
    }

    proptest! {
        #[test]
        fn whatever_the_file_says_the_limits_are_within_theirs_or_it_is_said_where_the_mistake_is(
            text in prop_oneof![3 => limits(), 3 => lines(), 1 => "(.|\n){0,60}"],
        ) {
            match Settings::parse(&text) {
                Ok(Settings { limits, .. }) => {
                    prop_assert_eq!(limits.mistake(), None);
                    prop_assert!(limits.memory_bytes() <= 4 << 30 && limits.output_bytes() <= 128 << 20);
                    prop_assert!(limits.wall() <= std::time::Duration::from_mins(1));
                }
                Err(reason) => prop_assert!(
                    reason.starts_with("TOML parse error at line ") || reason.starts_with("[limits] "),
                    "{}",
                    reason
                ),
            }
        }
    }
}
