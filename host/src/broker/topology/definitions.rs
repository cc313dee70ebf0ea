//! The daemon's topology as definitions for RabbitMQ to import, for an operator who declares it before the daemon
//! starts and gives the daemon's user only the permissions that it needs.

use serde_json::{Value, json};

use crate::broker::topology::DeclaredEntity;
use crate::broker::{Broker, QueueType};

impl Broker {
    /// The exchanges, the queues, the binding, and the permissions of the daemon's user: the fewest that it needs, or,
    /// if it `declares` all of this itself, those that it needs for that as well. RabbitMQ can import the result when
    /// the virtual host and the user exist.
    #[must_use]
    pub fn definitions(&self, declares: bool) -> Value {
        let vhost = &self.uri.vhost;
        let definition = |entity: DeclaredEntity| {
            let mut definition = json!({
                "vhost": vhost, "name": entity.name(&self.exchange), "durable": true, "auto_delete": false,
                "arguments": if entity.exchange_type().is_some() { json!({}) } else { arguments(self.queue_type) },
            });
            if let Some(exchange_type) = entity.exchange_type() {
                definition["type"] = exchange_type.into();
                definition["internal"] = false.into();
            }
            definition
        };
        let (exchanges, queues): (Vec<_>, Vec<_>) =
            DeclaredEntity::ALL.into_iter().partition(|entity| entity.exchange_type().is_some());
        let binding = json!({
            "vhost": vhost, "source": DeclaredEntity::DeadLetterExchange.name(&self.exchange),
            "destination": DeclaredEntity::DeadQueue.name(&self.exchange), "destination_type": "queue",
            "routing_key": "", "arguments": {},
        });
        let [configure, write, read] = permission_patterns(&self.exchange, declares);
        let user = &self.uri.authority.userinfo.username;
        json!({
            "exchanges": exchanges.into_iter().map(definition).collect::<Vec<_>>(),
            "queues": queues.into_iter().map(definition).collect::<Vec<_>>(),
            "bindings": [binding],
            "permissions": [{ "vhost": vhost, "user": user, "configure": configure, "write": write, "read": read }],
        })
    }
}

fn arguments(queue_type: QueueType) -> Value {
    let mut arguments = json!({ "x-queue-type": queue_type.name() });
    if let Some(limit) = queue_type.delivery_limit() {
        arguments["x-delivery-limit"] = limit.into();
    }
    arguments
}

/// The patterns for configure, write and read. The daemon publishes to its exchange and, by the names of queues, to the
/// default exchange, and it reads both its queues. To bind, it must be allowed to write to the queue and to read from
/// the exchange.
fn permission_patterns(exchange: &str, declares: bool) -> [String; 3] {
    let name = escaped_name(exchange);
    if declares {
        [
            format!(r"^{name}(\.dlx|\.dead|\.parking|\.fleet.*)?$"),
            format!(r"^({name}|{name}\.dead|{name}\.fleet.*|amq\.default)$"),
            format!(r"^{name}\.(dlx|dead|parking|fleet.*)$"),
        ]
    } else {
        ["^$".into(), format!(r"^({name}|amq\.default)$"), format!(r"^{name}\.(dead|parking)$")]
    }
}

/// A regular expression that matches exactly this name, without anchors.
fn escaped_name(name: &str) -> String {
    let escape = |character: char| {
        let special = character.is_ascii_punctuation() && !matches!(character, '-' | '_');
        special.then_some('\\').into_iter().chain([character])
    };
    name.chars().flat_map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_permission_patterns() {
        assert_eq!(escaped_name("shop.v2-a_b"), r"shop\.v2-a_b");
        assert_eq!(permission_patterns("a.b", false)[1], r"^(a\.b|amq\.default)$");
    }
}
