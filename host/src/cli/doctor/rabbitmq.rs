//! What the doctor finds in the broker.

use std::sync::Arc;

use crate::broker::{Broker, BrokerError, BrokerSettings, Found, Management, ManagementError, OwnEntity};
use crate::cli::doctor::Report;
use crate::model::secret_url::SecretUrl;
use crate::model::wake::Wake;

pub(super) async fn check(report: &mut Report, settings: &BrokerSettings, management: Option<&SecretUrl>) {
    let broker = Broker::new(settings, Arc::new(Wake::default()));
    let Some(there) = topology(report, &broker).await else { return };
    let Some(url) = management else {
        return report.note(
            "policies and alarms are not to be seen over AMQP: give RabbitMQ's management API in TIDINGS_MANAGEMENT_URL, such as http://user:password@host:15672, and they are checked as well",
        );
    };
    let management = Management::of(url);
    for queue in [OwnEntity::Dead, OwnEntity::Parking].into_iter().filter(|own| there.contains(own)) {
        if !policy(report, &broker, &management, queue).await {
            return;
        }
    }
    if there.contains(&OwnEntity::Dead) && !bound(report, &broker, &management).await {
        return;
    }
    alarms(report, &management).await;
}

/// Looks at the four things that are ours, and returns those that are there.
async fn topology(report: &mut Report, broker: &Broker) -> Option<Vec<OwnEntity>> {
    let visit = match broker.visit().await {
        Ok(visit) => visit,
        Err(error) => {
            report.fail(unreached(error));
            return None;
        }
    };
    report.ok(format_args!("RabbitMQ answers at {} and lets us in", broker.place()));
    let (mut there, mut letters) = (Vec::new(), [None; 2]);
    for own in OwnEntity::ALL {
        let what = own.describe(broker.exchange());
        match visit.look(own).await {
            Ok(found @ (Found::Ours(waiting) | Found::AsItIs(waiting))) => {
                if matches!(found, Found::Ours(_)) {
                    report.ok(format_args!("{what} is there, as the daemon declares it"));
                } else {
                    report.note(format_args!(
                        "{what} is there, and our user may not declare it, so it is not compared: see that it is {}",
                        broker.wanted(own)
                    ));
                }
                there.push(own);
                match own {
                    OwnEntity::Dead => letters[0] = Some(waiting),
                    OwnEntity::Parking => letters[1] = Some(waiting),
                    OwnEntity::Exchange | OwnEntity::DeadLetterExchange => {}
                }
            }
            Ok(Found::Absent(said)) => {
                let wanted = broker.wanted(own);
                report.note(format_args!(
                    "{wanted} is not there ({said}): `tidings run` declares it when it starts, if its user may"
                ));
            }
            // It says what to do.
            Err(error @ BrokerError::Mismatch { .. }) => report.fail(format_args!("{:#}", anyhow::Error::from(error))),
            Err(error) => report.fail(format_args!(
                "{:#}; see that the user may configure, write and read {what}, and what RabbitMQ says in its log",
                anyhow::Error::from(error)
            )),
        }
    }
    visit.close().await;
    if let [Some(dead), Some(parked)] = letters {
        match (dead, parked) {
            (0, 0) => report.ok("no letter is dead or parked"),
            _ => report.note(format_args!(
                "{dead} letters are dead, for the next pass, and {parked} are parked; see `tidings dead list` and `tidings parked list`"
            )),
        }
    }
    Some(there)
}

/// What cannot be used at all, and what to do.
fn unreached(error: BrokerError) -> String {
    let advice = match &error {
        // They say it.
        BrokerError::Login { .. } | BrokerError::Certificate { .. } => "",
        _ => "; see that it runs, and that TIDINGS_AMQP_URL names it",
    };
    format!("{:#}{advice}", anyhow::Error::from(error))
}

/// Returns whether the management API can be asked again.
async fn policy(report: &mut Report, broker: &Broker, management: &Management, queue: OwnEntity) -> bool {
    let complaints = match management.queue(broker, queue).await {
        Ok(Some(seen)) => broker.complaints(queue, &seen),
        // It went meanwhile.
        Ok(None) => return true,
        Err(error) => {
            unasked(report, error);
            return false;
        }
    };
    if complaints.is_empty() {
        report.ok(format_args!("no policy takes letters away from the queue {}", queue.name(broker.exchange())));
    }
    for complaint in complaints {
        report.warn(complaint);
    }
    true
}

/// Returns whether the management API can be asked again.
async fn bound(report: &mut Report, broker: &Broker, management: &Management) -> bool {
    let (dead, source) =
        (OwnEntity::Dead.describe(broker.exchange()), OwnEntity::DeadLetterExchange.name(broker.exchange()));
    match management.is_bound(broker).await {
        Ok(true) => report.ok(format_args!("{dead} is bound to {source}")),
        Ok(false) => report.fail(format_args!(
            "{dead} is not bound to {source}, and what consumers reject is lost: `tidings run` binds it within seconds, or bind it by hand"
        )),
        Err(error) => {
            unasked(report, error);
            return false;
        }
    }
    true
}

async fn alarms(report: &mut Report, management: &Management) {
    match management.alarms().await {
        Ok(alarms) if alarms.is_empty() => report.ok("no alarm of RabbitMQ is in effect"),
        Ok(alarms) => report.fail(format_args!(
            "an alarm of RabbitMQ is in effect, and nobody can publish: {}; free what has run out there",
            alarms.join(", ")
        )),
        Err(error) => unasked(report, error),
    }
}

/// The deployment may be well; what is not is the question.
fn unasked(report: &mut Report, error: ManagementError) {
    report.warn(format_args!(
        "{:#}; see that TIDINGS_MANAGEMENT_URL names it, with a user who has the tag management or monitoring",
        anyhow::Error::from(error)
    ));
}
