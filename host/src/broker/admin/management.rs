//! RabbitMQ's management API, for what AMQP does not tell: the types and policies of our queues, whether one is bound, and
//! alarms. It may be left out.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;
use thiserror::Error;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::broker::{Broker, OwnEntity, QueueType};
use crate::model::secret_url::SecretUrl;

/// For each question, everything included.
const DEADLINE: Duration = Duration::from_secs(10);
/// What a policy may say of a queue that makes letters vanish from it.
const LOSES: [&str; 6] =
    ["message-ttl", "max-length", "max-length-bytes", "expires", "overflow", "dead-letter-exchange"];
/// A limit on how often a letter may come back that nobody reaches; ours.
const NEVER: i64 = i32::MAX as i64;

/// Why it could not be asked.
#[derive(Debug, Error)]
pub enum ManagementError {
    /// It does not answer.
    #[error("could not ask RabbitMQ's management API at {place}")]
    Ask {
        /// Host and port.
        place: String,
        /// Why.
        #[source]
        source: ureq::Error,
    },
    /// It answers, and does not tell.
    #[error("RabbitMQ's management API at {place} answered with status {status}")]
    Status {
        /// Host and port.
        place: String,
        /// RowRef.
        status: u16,
    },
    /// It answers, and is something else.
    #[error("what answers at {place} is not RabbitMQ's management API")]
    Foreign {
        /// Host and port.
        place: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Where it is, and who we are there.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "it knows a password")]
pub struct Management {
    base: String,
    place: String,
    authorization: Option<String>,
}

/// What matters of one of our queues, as the API describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The names of its policies.
    pub policies: String,
    /// What of them makes letters vanish.
    pub loses: Vec<String>,
    /// `classic`, `quorum` or another.
    pub queue_type: String,
    /// How often a letter may come back before RabbitMQ throws it away, if anybody may live to see that: by an argument, a
    /// policy, or the default of RabbitMQ 4.
    pub limit: Option<i64>,
    /// Whether the API knows its policies yet, which takes it some seconds.
    pub complete: bool,
}

impl Management {
    /// Where the settings say it is.
    ///
    /// # Panics
    ///
    /// If `url` was not checked by the configuration.
    #[must_use]
    pub fn of(url: &SecretUrl) -> Self {
        Self::new(url).expect("the configuration accepts only URLs that can be understood")
    }

    /// Understands a URL.
    ///
    /// # Errors
    ///
    /// When it cannot, without the password in the answer.
    pub fn new(url: &SecretUrl) -> Result<Self, String> {
        let uri: ureq::http::Uri = url.expose().parse().map_err(|error| format!("{error}"))?;
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or("it names no host")?;
        let (host, port, authority) = (authority.host(), authority.port_u16(), authority.as_str());
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        if place.len() > host.len() && port.is_none() {
            return Err("its port is no number up to 65535".into());
        }
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain = |part| percent_decode_str(part).decode_utf8_lossy();
            format!("Basic {}", BASE64.encode(format!("{}:{}", plain(name), plain(password))))
        });
        let scheme = uri.scheme_str().unwrap_or("http");
        let base = format!("{scheme}://{place}{}", uri.path().trim_end_matches('/'));
        Ok(Self { base, place: place.to_owned(), authorization })
    }

    /// What matters of one of our queues; `None` = it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn queue(&self, broker: &Broker, own: OwnEntity) -> Result<Option<Seen>, ManagementError> {
        let path = format!("/api/queues/{}/{}", encoded(&broker.uri.vhost), encoded(&own.name(&broker.exchange)));
        match self.get(path).await? {
            (200, queue) => Ok(Some(seen(&queue))),
            (404, _) => Ok(None),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// Whether `tidings.dead` is bound to `tidings.dlx`.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn is_bound(&self, broker: &Broker) -> Result<bool, ManagementError> {
        let [source, queue] =
            [OwnEntity::DeadLetterExchange, OwnEntity::Dead].map(|own| encoded(&own.name(&broker.exchange)));
        match self.get(format!("/api/bindings/{}/e/{source}/q/{queue}", encoded(&broker.uri.vhost))).await? {
            (200, bindings) => Ok(bindings.as_array().is_some_and(|bindings| !bindings.is_empty())),
            (404, _) => Ok(false),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// The alarms in effect in the cluster, in words: while there is one, nobody can publish.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn alarms(&self) -> Result<Vec<String>, ManagementError> {
        match self.get("/api/health/checks/alarms".to_owned()).await? {
            (200, _) => Ok(Vec::new()),
            (503, answer) => Ok(alarms(&answer)),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    async fn get(&self, path: String) -> Result<(u16, Value), ManagementError> {
        let this = self.clone();
        // The client blocks; its deadline ends it.
        let asked = tokio::task::spawn_blocking(move || this.get_blocking(&path));
        asked.await.expect("asking does not panic")
    }

    fn get_blocking(&self, path: &str) -> Result<(u16, Value), ManagementError> {
        let failed = |source| ManagementError::Ask { place: self.place.clone(), source };
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(DEADLINE))
            .http_status_as_error(false)
            // It lies beside RabbitMQ, where no proxy is asked either.
            .proxy(None);
        if self.base.starts_with("https:") {
            // Whom this machine trusts, as for the other two servers.
            let roots = rustls_native_certs::load_native_certs().certs;
            let roots = roots.iter().map(|root| Certificate::from_der(root).to_owned());
            config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::from(roots)).build());
        }
        let mut request = config.build().new_agent().get(format!("{}{path}", self.base));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let mut answer = request.call().map_err(failed)?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().map_err(failed)?;
        if !matches!(status, 200 | 503) {
            return Ok((status, Value::Null));
        }
        let value = serde_json::from_str(&text);
        let value = value.map_err(|source| ManagementError::Foreign { place: self.place.clone(), source })?;
        Ok((status, value))
    }
}

impl Broker {
    /// What makes letters vanish from one of our queues, or is another than was asked for, each with the way out.
    #[must_use]
    pub fn complaints(&self, own: OwnEntity, seen: &Seen) -> Vec<String> {
        seen.complaints(own, &self.exchange, self.queue_type)
    }
}

impl Seen {
    fn complaints(&self, own: OwnEntity, exchange: &str, queue_type: QueueType) -> Vec<String> {
        let (what, name) = (own.describe(exchange), own.name(exchange));
        let mut complaints = Vec::new();
        if self.queue_type != queue_type.name() {
            complaints.push(format!(
                "{what} is of the type {}, and TIDINGS_QUEUE_TYPE asks for {}: stop the daemons, empty it (`tidings dead replay`, `tidings parked retry --all`) and delete it",
                self.queue_type,
                queue_type.name()
            ));
        }
        if !self.loses.is_empty() {
            complaints.push(format!(
                "the policy {} takes letters away from {what} ({}), and they are lost: let its pattern spare this queue",
                self.policies,
                self.loses.join(", ")
            ));
        }
        if let Some(limit) = self.limit {
            let by = if self.policies.is_empty() {
                "by its argument, or by default".to_owned()
            } else {
                format!("see the policy {}", self.policies)
            };
            complaints.push(format!(
                "RabbitMQ throws a letter in {what} away when it has come back {limit} times from whoever looked at it or gave up in the middle of a pass ({by}): give the queue a policy with a limit that is never reached, such as {{\"delivery-limit\": {NEVER}}} for ^{}$, above all others, and no lower one in an operator policy",
                name.replace('.', "\\.")
            ));
        }
        complaints
    }
}

fn encoded(name: &str) -> String {
    utf8_percent_encode(name, NON_ALPHANUMERIC).to_string()
}

fn seen(queue: &Value) -> Seen {
    let names = ["policy", "operator_policy"].iter().filter_map(|name| queue[name].as_str()).collect::<Vec<_>>();
    // Without a policy it is an empty list.
    let policy = &queue["effective_policy_definition"];
    let said = policy.as_object().into_iter().flatten();
    let loses = said.filter(|(name, _)| LOSES.contains(&name.as_str()));
    let queue_type = queue["type"].as_str().unwrap_or("classic").to_owned();
    let limit = if queue_type != "quorum" {
        None
    } else if queue["delivery_limit"].is_null() {
        // Before 4.0 it does not say what comes of both, and has no default.
        [&queue["arguments"]["x-delivery-limit"], &policy["delivery-limit"]].into_iter().filter_map(Value::as_i64).min()
    } else {
        // `unlimited`, or a number.
        queue["delivery_limit"].as_i64()
    };
    Seen {
        policies: names.join(" and "),
        loses: loses.map(|(name, value)| format!("{name} = {value}")).collect(),
        queue_type,
        limit: limit.filter(|limit| *limit < NEVER),
        complete: !policy.is_null(),
    }
}

/// What the API says when it is not well.
fn alarms(answer: &Value) -> Vec<String> {
    let words = |alarm: &Value| match (alarm["resource"].as_str(), alarm["node"].as_str()) {
        (Some(resource), Some(node)) => format!("{resource} of {node}"),
        _ => alarm.to_string(),
    };
    match answer["alarms"].as_array() {
        Some(alarms) => alarms.iter().map(words).collect(),
        None => vec![answer.to_string()],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn management(url: &str) -> Result<Management, String> {
        Management::new(&SecretUrl::from(url.to_owned()))
    }

    #[test]
    fn a_url_is_taken_apart_and_its_password_decoded() {
        let there = management("https://user:p%40ss@host:15671/rabbit/").expect("a URL");
        assert_eq!((there.base.as_str(), there.place.as_str()), ("https://host:15671/rabbit", "host:15671"));
        assert_eq!(there.authorization, Some(format!("Basic {}", BASE64.encode("user:p@ss"))));
        assert_eq!(management("http://host").expect("a URL").authorization, None);
    }

    #[test]
    fn a_url_that_cannot_be_understood_is_refused_without_its_password() {
        for url in ["http://user:secret@host:port", "http://user:secret@", "http://user:secret@ho st"] {
            let error = management(url).map(|there| there.base).expect_err(url);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_policy_matters_only_if_letters_vanish_by_it() {
        let none = json!({ "type": "classic", "effective_policy_definition": [], "policy": null });
        assert!(seen(&none).loses.is_empty());
        let bad = json!({
            "type": "classic",
            "policy": "all",
            "operator_policy": "limits",
            "effective_policy_definition": { "message-ttl": 1000, "queue-mode": "lazy", "delivery-limit": 5 },
        });
        let Seen { policies, loses, limit, .. } = seen(&bad);
        assert_eq!((&*policies, loses, limit), ("all and limits", vec!["message-ttl = 1000".to_owned()], None));
    }

    #[test]
    fn the_lowest_limit_on_returns_counts_and_ours_is_none() {
        let quorum = |argument: Value, policy: Value, says: Value| {
            let queue = json!({
                "type": "quorum",
                "arguments": { "x-delivery-limit": argument },
                "effective_policy_definition": { "delivery-limit": policy },
                "delivery_limit": says,
            });
            seen(&queue).limit
        };
        let nothing = Value::Null;
        for (argument, policy, says, limit) in [
            (&nothing, &nothing, &nothing, None),
            (&nothing, &nothing, &json!(20), Some(20)),
            (&json!(NEVER), &nothing, &nothing, None),
            (&json!(NEVER), &json!(5), &nothing, Some(5)),
            (&json!(3), &json!(5), &nothing, Some(3)),
            (&json!(NEVER), &nothing, &json!(NEVER), None),
            (&json!(NEVER), &json!(5), &json!(5), Some(5)),
            (&nothing, &json!(-1), &json!("unlimited"), None),
        ] {
            assert_eq!(quorum(argument.clone(), policy.clone(), says.clone()), limit, "{argument} {policy} {says}");
        }
    }

    #[test]
    fn a_complaint_names_the_queue_and_the_way_out() {
        let well = Seen {
            policies: String::new(),
            loses: Vec::new(),
            queue_type: "quorum".into(),
            limit: None,
            complete: true,
        };
        assert!(well.complaints(OwnEntity::Dead, "shop", QueueType::Quorum).is_empty());
        let bad = Seen { loses: vec!["expires = 1".into()], policies: "all".into(), limit: Some(20), ..well };
        let complaints = bad.complaints(OwnEntity::Dead, "shop", QueueType::Classic);
        assert_eq!(complaints.len(), 3, "{complaints:?}");
        assert!(complaints.iter().all(|complaint| complaint.contains("the queue shop.dead")), "{complaints:?}");
        assert!(complaints[2].contains(r#"{"delivery-limit": 2147483647} for ^shop\.dead$"#), "{complaints:?}");
    }

    #[test]
    fn alarms_are_named_by_resource_and_node() {
        let answer = json!({ "status": "failed", "alarms": [{ "resource": "memory", "node": "rabbit@one" }] });
        assert_eq!(alarms(&answer), ["memory of rabbit@one"]);
        assert_eq!(alarms(&json!({ "status": "failed" })).len(), 1);
    }
}
