//! The settings file of a plugin, `NAME.toml` beside `NAME.wasm`: its configuration and its limits. If the file has a
//! mistake, the plugin is refused rather than loaded with a part of its configuration.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::plugins::runtime::limits::Limits;

/// The contents of NAME.toml.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The values that the plugin gets from `host.config`.
    pub config: BTreeMap<String, String>,
    /// The limits of the plugin's calls.
    pub limits: Limits,
}

impl Settings {
    /// Parses the text of the file.
    ///
    /// # Errors
    ///
    /// When the text has a mistake: a sentence that says what is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let settings: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.limits.find_mistake().map_or(Ok(settings), Err)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_setting_that_is_missing_has_its_default() {
        assert_eq!(Settings::parse(""), Ok(Settings::default()));
        let settings = Settings::parse("[config]\ncurrency = \"EUR\"\n[limits]\ncpu-ms = 500\n").expect("settings");
        assert_eq!(settings.config["currency"], "EUR");
        assert_eq!(settings.limits, Limits { cpu_ms: 500, ..Limits::default() });
    }

    #[test]
    fn a_setting_that_is_misspelt_of_a_wrong_type_or_out_of_range_is_named() {
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
    fn deeply_nested_tables_are_refused_without_a_stack_overflow() {
        for (part, text) in
            [("[", "a = "), ("{a=", "a = "), ("a.", ""), ("[a.", ""), ("[[a.", ""), ("[a]\n[a.a]\n", "")]
        {
            let text = [text, &part.repeat(64 * 1024 / part.len())].concat();
            let reason = Settings::parse(&text).expect_err(part);
            assert!(reason.contains("line"), "{part}");
        }
    }

    /// Lines that are settings, or look like settings.
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

    /// Limits, each inside or outside its range.
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
        fn limits_outside_their_range_are_refused_with_the_line_of_the_mistake(
            text in prop_oneof![3 => limits(), 3 => lines(), 1 => "(.|\n){0,60}"],
        ) {
            match Settings::parse(&text) {
                Ok(Settings { limits, .. }) => {
                    prop_assert_eq!(limits.find_mistake(), None);
                    prop_assert!(limits.memory_bytes() <= 4 << 30 && limits.output_bytes() <= 128 << 20);
                    prop_assert!(limits.wall_time() <= std::time::Duration::from_mins(1));
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
