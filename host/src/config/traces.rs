//! The settings of the traces. Their names are not ours but those that every program knows them by, so what is set for the
//! others is set for this one; those that are not checked here are read by the library.

use std::time::Duration;

use crate::config::validation::{number, url};
use crate::model::secret_url::SecretUrl;
use crate::telemetry::{TraceSettings, check_endpoint};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";

/// Those that the library has. Another one would be taken for the default without a word.
const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

/// Where traces go, if they do. `variable` is the value of a variable, if it has one.
pub(super) fn traces(variable: impl Fn(&str) -> Option<String>, mistakes: &mut Vec<String>) -> Option<TraceSettings> {
    // An empty one is none, as OpenTelemetry has it.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let is = |name: &str, value: &str| variable(name).is_some_and(|set| set.eq_ignore_ascii_case(value));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    let (name, path) =
        if variable(TRACES_ENDPOINT).is_some() { (TRACES_ENDPOINT, "") } else { (ENDPOINT, "v1/traces") };
    let given = variable(name)?;
    let endpoint = url(name, Some(given), &["http://", "https://"], mistakes, check_endpoint);

    // The first that is set.
    let either =
        |names: [&'static str; 2]| names.into_iter().find_map(|name| variable(name).map(|value| (name, value)));
    if let Some((name, protocol)) = either(["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"])
        && protocol != "http/protobuf"
    {
        mistakes.push(format!(
            "{name} is {protocol:?}, and only http/protobuf is spoken here; the collector has a port of its own for it, 4318 as a rule"
        ));
    }
    let timeout = either(["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]);
    let (name, timeout) = timeout.unwrap_or(("OTEL_EXPORTER_OTLP_TIMEOUT", "10000".into()));
    let timeout_ms = number(name, &timeout, 1, 600_000, mistakes);
    let queue = variable("OTEL_BSP_MAX_QUEUE_SIZE").unwrap_or_else(|| "2048".into());
    let queue = number("OTEL_BSP_MAX_QUEUE_SIZE", &queue, 1, 1_000_000, mistakes);
    let sampler = variable(SAMPLER).unwrap_or_default();
    if !sampler.is_empty() && !SAMPLERS.contains(&sampler.as_str()) {
        mistakes.push(format!("{SAMPLER} is {sampler:?}, which is none of {}", SAMPLERS.join(", ")));
    }
    if sampler.ends_with("traceidratio") {
        let ratio = variable(SAMPLER_ARG).unwrap_or_default();
        if !ratio.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio)) {
            mistakes.push(format!("{SAMPLER_ARG} is {ratio:?}, which is not a number from 0 to 1"));
        }
    }

    let base = endpoint?;
    let between = if path.is_empty() || base.expose().ends_with('/') { "" } else { "/" };
    let endpoint = SecretUrl::from(format!("{}{between}{path}", base.expose()));
    let queue = usize::try_from(queue?).expect("a million fits");
    Some(TraceSettings { endpoint, timeout: Duration::from_millis(timeout_ms?.into()), queue })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What comes of these variables.
    fn set(variables: &[(&str, &str)]) -> Result<Option<TraceSettings>, Vec<String>> {
        let value =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
        let mut mistakes = Vec::new();
        let settings = traces(value, &mut mistakes);
        if mistakes.is_empty() { Ok(settings) } else { Err(mistakes) }
    }

    /// Where they go.
    fn endpoint(variables: &[(&str, &str)]) -> Option<String> {
        set(variables).expect("no mistake").map(|settings| settings.endpoint.expose().to_owned())
    }

    #[test]
    fn they_are_off_unless_somebody_says_where_they_go_and_nobody_that_they_do_not() {
        assert_eq!(endpoint(&[]), None);
        assert_eq!(endpoint(&[(ENDPOINT, ""), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]), None);
        let there = (ENDPOINT, "http://collector:4318");
        assert_eq!(endpoint(&[there]).as_deref(), Some("http://collector:4318/v1/traces"));
        assert_eq!(endpoint(&[there, ("OTEL_SDK_DISABLED", "False")]), endpoint(&[there]));
        assert_eq!(endpoint(&[there, ("OTEL_SDK_DISABLED", "True")]), None);
        assert_eq!(endpoint(&[there, ("OTEL_TRACES_EXPORTER", "none")]), None);
        assert_eq!(endpoint(&[(ENDPOINT, "https://c/otlp/")]).as_deref(), Some("https://c/otlp/v1/traces"));
        assert_eq!(endpoint(&[there, (TRACES_ENDPOINT, "http://[::1]/x")]).as_deref(), Some("http://[::1]/x"));
    }

    #[test]
    fn every_mistake_is_told_with_its_variable_and_without_a_secret() {
        for name in [ENDPOINT, TRACES_ENDPOINT] {
            for value in
                ["collector:4318", "http://", "http://c:port", "http://u:secret@c", "http://c/u:secret@d", "ftp://c"]
            {
                let mistakes = set(&[(name, value)]).expect_err(value);
                assert!(
                    matches!(&*mistakes, [one] if one.starts_with(name) && !one.contains("secret")),
                    "{mistakes:?}"
                );
            }
        }
        let wrong = [
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
            (SAMPLER, "xray"),
        ];
        let mut variables = vec![(ENDPOINT, "http://c")];
        variables.extend(wrong);
        let mistakes = set(&variables).expect_err("four of them");
        let told = |name: &str| mistakes.iter().any(|mistake| mistake.starts_with(&format!("{name} is ")));
        assert!(mistakes.len() == wrong.len() && wrong.iter().all(|(name, _)| told(name)), "{mistakes:?}");

        let ratio = |ratio| set(&[(ENDPOINT, "http://c"), (SAMPLER, "parentbased_traceidratio"), (SAMPLER_ARG, ratio)]);
        assert!(ratio("0.25").is_ok() && ratio("").is_err() && ratio("2").is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_set_can_be_used_or_is_a_mistake(value in "(https?://)?\\PC{0,20}|https?://[a-z0-9.:\\[\\]@/%]{0,20}") {
            match set(&[(ENDPOINT, &value)]) {
                Ok(settings) => prop_assert!(settings.is_none() == value.is_empty()),
                Err(mistakes) => prop_assert!(mistakes.len() == 1 && mistakes[0].starts_with(ENDPOINT)),
            }
        }
    }
}
