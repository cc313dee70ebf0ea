//! What the doctor finds in the broker.

use std::sync::Arc;

use super::Report;
use crate::broker::{Broker, BrokerError, BrokerSettings, Found, Management, ManagementError, Own};
use crate::secret_url::SecretUrl;
use crate::wake::Wake;

pub(super) async fn check(report: &mut Report, settings: &BrokerSettings, management: Option<&SecretUrl>) {
    let broker = Broker::new(settings, Arc::new(Wake::default()));
    let Some(there) = topology(report, &broker).await else { return };
    let Some(url) = management else {
        return report.note(
            "policies and alarms are not to be seen over AMQP: give RabbitMQ's management API in TIDINGS_MANAGEMENT_URL, such as http://user:password@host:15672, and they are checked as well",
        );
    };
    let management = Management::new(url).expect("the configuration accepts only URLs that can be understood");
    for queue in there.into_iter().filter(|own| matches!(own, Own::Dead | Own::Parking)) {
        if !policy(report, &broker, &management, queue).await {
            return;
        }
    }
    alarms(report, &management).await;
}

/// Looks at the four things that are ours, and returns those that are there.
async fn topology(report: &mut Report, broker: &Broker) -> Option<Vec<Own>> {
    let visit = match broker.visit().await {
        Ok(visit) => visit,
        Err(error) => {
            report.fail(unreached(error));
            return None;
        }
    };
    report.ok(format_args!("RabbitMQ answers at {} and lets us in", broker.place()));
    let (mut there, mut letters) = (Vec::new(), [None; 2]);
    for own in Own::ALL {
        let what = own.describe(broker.exchange());
        match visit.look(own).await {
            Ok(Found::Ours(waiting)) => {
                report.ok(format_args!("{what} is there, as the daemon declares it"));
                there.push(own);
                match own {
                    Own::Dead => letters[0] = Some(waiting),
                    Own::Parking => letters[1] = Some(waiting),
                    Own::Exchange | Own::DeadLetterExchange => {}
                }
            }
            Ok(Found::Absent(said)) => {
                report.note(format_args!("{what} is not there ({said}): `tidings run` declares it when it starts"));
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
async fn policy(report: &mut Report, broker: &Broker, management: &Management, queue: Own) -> bool {
    let name = queue.name(broker.exchange());
    match management.policy(broker, &name).await {
        Ok(policy) if policy.loses.is_empty() => {
            report.ok(format_args!("no policy takes letters away from the queue {name}"));
        }
        Ok(policy) => report.warn(format_args!(
            "the policy {} takes letters away from the queue {name} ({}), and they are lost: let its pattern spare this queue",
            policy.names,
            policy.loses.join(", ")
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
