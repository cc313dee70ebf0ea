//! The doctor's checks of RabbitMQ.

use std::sync::Arc;

use crate::broker::{Broker, BrokerError, BrokerSettings, DeclaredEntity, Found, Management, ManagementError};
use crate::cli::doctor::Report;
use crate::model::secrets::SecretUrl;
use crate::model::wake::Wake;

pub(super) async fn check(report: &mut Report, settings: &BrokerSettings, management: Option<&SecretUrl>) {
    let broker = Broker::new(settings, Arc::new(Wake::default()));
    let Some(existing) = check_topology(report, &broker).await else { return };
    let Some(url) = management else {
        return report.note(
            "policies and alarms cannot be seen over AMQP: to have them checked, give RabbitMQ's management API in TIDINGS_MANAGEMENT_URL, such as http://user:password@host:15672",
        );
    };
    let management = Management::of(url);
    for queue in broker.own_queues().iter().filter(|own| existing.contains(own)) {
        if !check_policy(report, &broker, &management, queue).await {
            return;
        }
    }
    if !check_intakes(report, &broker, &management).await {
        return;
    }
    if existing.contains(&DeclaredEntity::DeadQueue) && !check_binding(report, &broker, &management).await {
        return;
    }
    check_alarms(report, &management).await;
}

/// Looks at the exchanges and queues of the daemon, and returns those that exist.
async fn check_topology(report: &mut Report, broker: &Broker) -> Option<Vec<DeclaredEntity>> {
    let visit = match broker.visit().await {
        Ok(visit) => visit,
        Err(error) => {
            report.fail(describe_failure(error));
            return None;
        }
    };
    report.ok(format_args!("RabbitMQ answers at {} and lets us in", broker.place()));
    let (mut existing, mut letter_counts) = (Vec::new(), [None; 2]);
    for own in broker.declared() {
        let what = own.describe(broker.exchange());
        match visit.look(&own).await {
            Ok(found @ (Found::Ours(waiting) | Found::AsItIs(waiting))) => {
                if matches!(found, Found::Ours(_)) {
                    report.ok(format_args!("{what} is there, as the daemon declares it"));
                } else {
                    report.note(format_args!(
                        "{what} is there, and our user may not declare it, so its arguments are not compared: check that it is {}",
                        broker.wanted(&own)
                    ));
                }
                match own {
                    DeclaredEntity::DeadQueue => letter_counts[0] = Some(waiting),
                    DeclaredEntity::ParkingQueue => letter_counts[1] = Some(waiting),
                    _ => {}
                }
                existing.push(own);
            }
            Ok(Found::OfAnotherType(kind)) => {
                if kind == "direct" && matches!(own, DeclaredEntity::IntakeSource(_)) {
                    report.warn(format_args!(
                        "{what} is of the type direct, so an operator has to bind the intake's queue to it with each routing key"
                    ));
                } else {
                    report.ok(format_args!("{what} is there, of the type {kind}, and is used as it is"));
                }
                existing.push(own);
            }
            Ok(Found::Absent(reply)) => {
                let wanted = broker.wanted(&own);
                report.note(format_args!(
                    "{wanted} is not there ({reply}): `tidings run` declares it when it starts, if its user may"
                ));
            }
            // The error says what to do.
            Err(error @ (BrokerError::Mismatch { .. } | BrokerError::Delayed { .. })) => {
                report.fail(format_args!("{:#}", anyhow::Error::from(error)));
            }
            Err(error) => report.fail(format_args!(
                "{:#}; see that the user may configure, write and read {what}, and what RabbitMQ says in its log",
                anyhow::Error::from(error)
            )),
        }
    }
    visit.close().await;
    if let [Some(dead), Some(parked)] = letter_counts {
        match (dead, parked) {
            (0, 0) => report.ok("no dead letters wait, and none are parked"),
            _ => report.note(format_args!(
                "{dead} letters are dead, for the next pass, and {parked} are parked; see `tidings dead list` and `tidings parked list`"
            )),
        }
    }
    Some(existing)
}

/// Says why RabbitMQ cannot be used, and what to do.
fn describe_failure(error: BrokerError) -> String {
    let advice = match &error {
        // These errors say what to do.
        BrokerError::Login { .. } | BrokerError::Certificate { .. } => "",
        _ => "; see that it runs, and that TIDINGS_AMQP_URL names it",
    };
    format!("{:#}{advice}", anyhow::Error::from(error))
}

/// Checks the policy of a queue. Returns whether the management API answered.
async fn check_policy(report: &mut Report, broker: &Broker, management: &Management, queue: &DeclaredEntity) -> bool {
    let complaints = match management.queue(broker, queue).await {
        Ok(Some(seen)) => broker.complaints(queue, &seen),
        // The queue was deleted in the meantime.
        Ok(None) => return true,
        Err(error) => {
            warn_unanswered(report, error);
            return false;
        }
    };
    if complaints.is_empty() {
        report.ok(format_args!("no policy removes dead letters from the queue {}", queue.name(broker.exchange())));
    }
    for complaint in complaints {
        report.warn(complaint);
    }
    true
}

/// Checks the binding of the queue of dead letters. Returns whether the management API answered.
async fn check_binding(report: &mut Report, broker: &Broker, management: &Management) -> bool {
    let (dead, source) = (
        DeclaredEntity::DeadQueue.describe(broker.exchange()),
        DeclaredEntity::DeadLetterExchange.name(broker.exchange()),
    );
    match management.is_bound(broker).await {
        Ok(true) => report.ok(format_args!("{dead} is bound to {source}")),
        Ok(false) => report.fail(format_args!(
            "{dead} is not bound to {source}, and what consumers reject is lost: `tidings run` binds it within seconds, or bind it by hand"
        )),
        Err(error) => {
            warn_unanswered(report, error);
            return false;
        }
    }
    true
}

/// Checks that the queue of each intake is bound to its exchange, and no other queue or exchange: another one gets the messages at
/// once, and not when they are due. Returns whether the management API answered.
async fn check_intakes(report: &mut Report, broker: &Broker, management: &Management) -> bool {
    for intake in broker.intakes() {
        let queue = intake.queue(broker.exchange());
        let bound = match management.bound_to(broker, &intake.from).await {
            Ok(bound) => bound,
            Err(error) => {
                warn_unanswered(report, error);
                return false;
            }
        };
        if bound.contains(&queue) {
            report.ok(format_args!("the queue {queue} is bound to the exchange {}", intake.from));
        } else {
            report.fail(format_args!(
                "the queue {queue} is not bound to the exchange {}, and what publishers send there is lost: `tidings run` binds it within seconds, or bind it by hand",
                intake.from
            ));
        }
        let others: Vec<String> = bound.into_iter().filter(|other| *other != queue).collect();
        if !others.is_empty() {
            let (is, gets, it) = if others.len() == 1 { ("is", "gets", "it") } else { ("are", "get", "them") };
            report.warn(format_args!(
                "{} {is} bound to the exchange {} as well, and {gets} each message when it is published: bind {it} to the exchange {}, where messages come when they are due",
                others.join(" and "),
                intake.from,
                intake.to
            ));
        }
    }
    true
}

async fn check_alarms(report: &mut Report, management: &Management) {
    match management.alarms().await {
        Ok(alarms) if alarms.is_empty() => report.ok("no alarm of RabbitMQ is in effect"),
        Ok(alarms) => report.fail(format_args!(
            "an alarm of RabbitMQ is in effect, and nobody can publish: {}; free the memory or disk space that has run out there",
            alarms.join(", ")
        )),
        Err(error) => warn_unanswered(report, error),
    }
}

/// Adds a warning, not a failure: the deployment may be well, only the management API did not answer.
fn warn_unanswered(report: &mut Report, error: ManagementError) {
    report.warn(format_args!(
        "{:#}; see that TIDINGS_MANAGEMENT_URL names it, with a user who has the tag management or monitoring",
        anyhow::Error::from(error)
    ));
}
