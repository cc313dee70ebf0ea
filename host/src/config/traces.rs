//! The settings of the traces. Their names are OpenTelemetry's, so the same variables configure this program and
//! others. The OpenTelemetry library reads the variables that are not checked here.

use std::time::Duration;

use crate::config::validation::{check_url, parse_number};
use crate::model::secrets::SecretUrl;
use crate::telemetry::{TraceSettings, check_endpoint};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";

/// The samplers of the library. It would silently replace any other by the default.
const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

/// Reads the settings; `None` = no traces. `variable` returns the value of a variable, if it is set.
pub(super) fn read_settings(
    variable: impl Fn(&str) -> Option<String>,
    errors: &mut Vec<String>,
) -> Option<TraceSettings> {
    // OpenTelemetry treats an empty variable as one that is not set.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let is = |name: &str, value: &str| variable(name).is_some_and(|set| set.eq_ignore_ascii_case(value));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    let (name, path) =
        if variable(TRACES_ENDPOINT).is_some() { (TRACES_ENDPOINT, "") } else { (ENDPOINT, "v1/traces") };
    let given = variable(name)?;
    let endpoint = check_url(name, Some(given), &["http://", "https://"], errors, check_endpoint);

    // The first of two variables that is set.
    let either =
        |names: [&'static str; 2]| names.into_iter().find_map(|name| variable(name).map(|value| (name, value)));
    if let Some((name, protocol)) = either(["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"])
        && protocol != "http/protobuf"
    {
        errors.push(format!(
            "{name} is {protocol:?}, but only http/protobuf is supported; the collector has its own port for it, usually 4318"
        ));
    }
    let timeout = either(["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]);
    let (name, timeout) = timeout.unwrap_or(("OTEL_EXPORTER_OTLP_TIMEOUT", "10000".into()));
    let timeout_ms = parse_number(name, &timeout, 1, 600_000, errors);
    let queue = variable("OTEL_BSP_MAX_QUEUE_SIZE").unwrap_or_else(|| "2048".into());
    let queue = parse_number("OTEL_BSP_MAX_QUEUE_SIZE", &queue, 1, 1_000_000, errors);
    let sampler = variable(SAMPLER).unwrap_or_default();
    if !sampler.is_empty() && !SAMPLERS.contains(&sampler.as_str()) {
        errors.push(format!("{SAMPLER} is {sampler:?}, which is none of {}", SAMPLERS.join(", ")));
    }
    if sampler.ends_with("traceidratio") {
        let ratio = variable(SAMPLER_ARG).unwrap_or_default();
        if !ratio.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio)) {
            errors.push(format!("{SAMPLER_ARG} is {ratio:?}, which is not a number from 0 to 1"));
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

    /// Reads the settings from these variables.
    fn read(variables: &[(&str, &str)]) -> Result<Option<TraceSettings>, Vec<String>> {
        let value =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned());
        let mut errors = Vec::new();
        let settings = read_settings(value, &mut errors);
        if errors.is_empty() { Ok(settings) } else { Err(errors) }
    }

    /// The endpoint of the traces.
    fn endpoint(variables: &[(&str, &str)]) -> Option<String> {
        read(variables).expect("no error").map(|settings| settings.endpoint.expose().to_owned())
    }

    #[test]
    fn traces_are_off_unless_an_endpoint_is_set_and_nothing_disables_them() {
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
    fn every_error_names_its_variable_and_shows_no_secret() {
        for name in [ENDPOINT, TRACES_ENDPOINT] {
            for value in
                ["collector:4318", "http://", "http://c:port", "http://u:secret@c", "http://c/u:secret@d", "ftp://c"]
            {
                let errors = read(&[(name, value)]).expect_err(value);
                assert!(matches!(&*errors, [one] if one.starts_with(name) && !one.contains("secret")), "{errors:?}");
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
        let errors = read(&variables).expect_err("four of them");
        let is_named = |name: &str| errors.iter().any(|error| error.starts_with(&format!("{name} is ")));
        assert!(errors.len() == wrong.len() && wrong.iter().all(|(name, _)| is_named(name)), "{errors:?}");

        let ratio =
            |ratio| read(&[(ENDPOINT, "http://c"), (SAMPLER, "parentbased_traceidratio"), (SAMPLER_ARG, ratio)]);
        assert!(ratio("0.25").is_ok() && ratio("").is_err() && ratio("2").is_err());
    }

    proptest! {
        #[test]
        fn any_endpoint_can_be_used_or_is_an_error(value in "(https?://)?\\PC{0,20}|https?://[a-z0-9.:\\[\\]@/%]{0,20}") {
            match read(&[(ENDPOINT, &value)]) {
                Ok(settings) => prop_assert!(settings.is_none() == value.is_empty()),
                Err(errors) => prop_assert!(errors.len() == 1 && errors[0].starts_with(ENDPOINT)),
            }
        }
    }
}
