//! The doctor's checks of PostgreSQL.

use crate::cli::doctor::{Level, Report, format_count};
use crate::cli::{format_age, pause_sentence, printable};
use crate::config::Config;
use crate::http::LATE;
use crate::model::error_chain::error_chain;
use crate::model::installation::Identity;
use crate::recurrences::zone;
use crate::store::{HolderKind, MAX_HOLD_AGE, Skew, Store, StoreError, VacuumHolder};

/// Clocks that differ by less are treated as equal.
const SMALL_SKEW: time::Duration = time::Duration::milliseconds(100);
/// With a larger difference, a consumer acts on a message after its deadline, or refuses it before.
const LARGE_SKEW: time::Duration = time::Duration::SECOND;
/// How many holders of a snapshot one line names at most.
const MAX_NAMED: usize = 5;
/// The advice when PostgreSQL does not answer a question.
const ADVICE: &str = "run the doctor again, and see what PostgreSQL says in its log";

pub(super) async fn check(report: &mut Report, config: &Config) {
    let store = Store::new(&config.servers.database_url, 1);
    if let Err(error) = store.probe().await {
        return report.fail(describe_failure(&error));
    }
    let place = store.place();
    report.ok(format_args!("PostgreSQL answers at {place} and lets us in"));
    if let Err(error) = store.check_server().await {
        return report.fail(describe_failure(&error));
    }
    report.ok(format_args!("PostgreSQL at {place} takes writes, and no pooler shares our sessions"));

    let schema_is_ok = match store.check_schema().await {
        Ok(()) => {
            report.ok(format_args!("the schema tidings at {place} is the one that this release works with"));
            true
        }
        // The error says what to do.
        Err(error) => {
            report.fail(error_chain(&error));
            false
        }
    };
    let rights_are_ok = schema_is_ok && check_rights(report, &store).await;
    check_version(report, &store).await;
    check_replication(report, &store).await;
    check_notification(report, &store, config).await;
    if schema_is_ok {
        check_triggers_and_indexes(report, &store).await;
    }
    if rights_are_ok {
        check_server_of_rows(report, &store).await;
    }
    check_clock(report, &store).await;
    check_snapshots(report, &store).await;
    check_notification_queue(report, &store).await;
    if rights_are_ok {
        check_rows(report, &store).await;
        check_recurrences(report, &store).await;
    }
}

/// Says why PostgreSQL cannot be used, and what to do.
fn describe_failure(error: &StoreError) -> String {
    let advice = match error {
        StoreError::Connect { .. } | StoreError::Deadline { .. } => {
            "; see that it runs, and that TIDINGS_DATABASE_URL names it"
        }
        StoreError::Statement { .. } => "; see what PostgreSQL says in its log",
        // The other errors say what to do.
        _ => "",
    };
    format!("{}{advice}", error_chain(error))
}

async fn check_rights(report: &mut Report, store: &Store) -> bool {
    match store.check_rights().await {
        Ok(()) => {
            report.ok("our role has the rights on the tables of the schema tidings that the daemon needs");
            true
        }
        Err(error) => {
            report.fail(describe_failure(&error));
            false
        }
    }
}

/// Says whether rows were last delivered from this server: otherwise it may be a copy.
async fn check_server_of_rows(report: &mut Report, store: &Store) {
    let Some(Some(Identity { recorded, here, .. })) = report.answer_or_fail(store.identity().await, ADVICE) else {
        return;
    };
    match recorded.first() {
        Some(last) if !recorded.contains(&here) => report.note(format_args!(
            "rows were last delivered from {last}, and this database is {here}: a daemon that starts here asks first whether daemons serve that one, and delivers nothing if they do"
        )),
        _ => report.ok(format_args!("this database, {here}, is the one from which rows are delivered")),
    }
}

/// Names the recurrences that can make no occurrence, with the reasons.
async fn check_recurrences(report: &mut Report, store: &Store) {
    let Some(counts) = report.answer_or_fail(store.count_recurrences().await, ADVICE) else { return };
    let count = |count: u64| format_count(i64::try_from(count).unwrap_or(i64::MAX));
    let (release, all) = (zone::release(), count(counts.all));
    if counts.problems == 0 {
        return report.ok(format_args!(
            "{all} recurrences, none with a problem, by the time zone database {release} of this tidings"
        ));
    }
    let most = i64::try_from(MAX_NAMED).unwrap_or(i64::MAX);
    let Some(problems) = report.answer_or_fail(store.recurrences_with_problem(most).await, ADVICE) else { return };
    let named: Vec<String> = problems
        .iter()
        .map(|it| format!("{}: {}", printable(&it.name), printable(it.problem.as_deref().unwrap_or("-"))))
        .collect();
    let and_others = if counts.problems > MAX_NAMED as u64 { "; and others" } else { "" };
    report.fail(format_args!(
        "{} of {all} recurrences make no occurrences: {}{and_others}; change them with tidings.repeat, or stop them",
        count(counts.problems),
        named.join("; "),
    ));
}

async fn check_version(report: &mut Report, store: &Store) {
    let Some(version) = report.answer_or_fail(store.server_version().await, ADVICE) else { return };
    if version.is_supported() {
        report.ok(format_args!("PostgreSQL {} is supported", version.text));
    } else {
        report.fail(format_args!("PostgreSQL {} is not supported: upgrade the server to 15 or later", version.text));
    }
}

/// Says what a failover would cost, if there are standbys.
async fn check_replication(report: &mut Report, store: &Store) {
    let Some(replication) = report.answer_or_fail(store.replication().await, ADVICE) else { return };
    if replication.standbys == 0 && !replication.has_several_hosts {
        return;
    }
    if replication.is_synchronous {
        report.ok("each commit waits for a standby, so a failover loses no row");
    } else {
        report.warn(format_args!(
            "no commit waits for a standby (synchronous_standby_names is empty, or synchronous_commit is off or local): a failover may lose the rows that were written last, and deliver again what was delivered last; {} standbys stream now",
            replication.standbys
        ));
    }
}

async fn check_notification(report: &mut Report, store: &Store, config: &Config) {
    let sweep = humantime::format_duration(config.sweep);
    if !config.notify {
        return report.note(format_args!(
            "TIDINGS_NOTIFY is off: rows that are due when they are written wait for a sweep, up to {sweep}"
        ));
    }
    match report.answer_or_fail(store.time_notification().await, ADVICE) {
        Some(Some(took)) => report.ok(format_args!("a notification takes {:.1} ms", took.as_secs_f64() * 1_000.0)),
        Some(None) => report.fail(format_args!(
            "a notification did not arrive, and rows that are due when they are written wait for a sweep, up to {sweep}: give PostgreSQL's own address in TIDINGS_DATABASE_URL instead of a pooler's, or set TIDINGS_NOTIFY=off"
        )),
        None => {}
    }
}

async fn check_triggers_and_indexes(report: &mut Report, store: &Store) {
    if let Some((flaws, all)) = report.answer_or_fail(store.check_triggers().await, ADVICE) {
        if flaws.is_empty() {
            report.ok(format_args!("the {all} triggers of tidings.schedules are there and enabled"));
        } else {
            report.fail(format_args!(
                "triggers of tidings.schedules do not work, so rows are found late or treated wrongly: {}",
                flaws.join("; ")
            ));
        }
    }
    if let Some((flaws, all)) = report.answer_or_fail(store.check_indexes().await, ADVICE) {
        if flaws.is_empty() {
            report.ok(format_args!("the {all} indexes of the schema tidings are there and valid"));
        } else {
            report.fail(format_args!(
                "indexes of the schema tidings do not work, so whole tables are read: {}",
                flaws.join("; ")
            ));
        }
    }
}

async fn check_clock(report: &mut Report, store: &Store) {
    let Some(Skew { ahead, give_or_take }) = report.answer_or_fail(store.clock_skew().await, ADVICE) else { return };
    let direction = if ahead.is_negative() { "behind" } else { "ahead of" };
    let found = format!(
        "this host's clock is {:.3} s {direction} the database's, give or take {:.1} ms",
        ahead.abs().as_seconds_f64(),
        give_or_take.as_secs_f64() * 1_000.0
    );
    let level = skew_level(ahead);
    match level {
        Level::Warn => report.warn(format_args!(
            "{found}: the daemon uses only the database's clock, but a consumer with such a clock misjudges tidings-expires-ms; let both hosts keep time by NTP"
        )),
        level => report.add(level, found),
    }
}

fn skew_level(ahead: time::Duration) -> Level {
    match ahead.abs() {
        large if large > LARGE_SKEW => Level::Warn,
        small if small < SMALL_SKEW => Level::Ok,
        _ => Level::Note,
    }
}

async fn check_snapshots(report: &mut Report, store: &Store) {
    let Some(holders) = report.answer_or_fail(store.holders().await, ADVICE) else { return };
    let minutes = MAX_HOLD_AGE.as_secs() / 60;
    let too_long: Vec<String> =
        holders.iter().filter(|holder| holder.is_too_long()).map(describe_with_remedy).collect();
    if !too_long.is_empty() {
        let more = if too_long.len() > MAX_NAMED {
            format!("; and {} more", too_long.len() - MAX_NAMED)
        } else {
            String::new()
        };
        return report.warn(format_args!(
            "finished rows cannot be cleaned away, which slows the queue down, because of {}{more}",
            too_long[..too_long.len().min(MAX_NAMED)].join("; ")
        ));
    }
    // Without pg_read_all_stats, PostgreSQL does not show the age of other roles' transactions.
    let unknown = holders.iter().filter(|holder| holder.holding == HolderKind::Session && holder.age.is_none()).count();
    if unknown > 0 {
        return report.note(format_args!(
            "{unknown} sessions of other roles hold a snapshot, and our role may not see since when: GRANT pg_read_all_stats TO our role, and the doctor checks whether they keep finished rows from being cleaned away"
        ));
    }
    match holders.iter().find(|holder| holder.age.is_some()) {
        Some(oldest) => report.ok(format_args!(
            "no snapshot has been held for more than {minutes} minutes; the oldest is that of {}",
            describe(oldest)
        )),
        None => report.ok(format_args!("no snapshot has been held for more than {minutes} minutes")),
    }
}

fn describe(holder: &VacuumHolder) -> String {
    let VacuumHolder { name, application, user, behind, .. } = holder;
    let held =
        holder.age.map_or_else(|| format!("{behind} transactions behind"), |held| format!("for {}", format_age(held)));
    match holder.holding {
        HolderKind::Session => format!("the session with the pid {name} ({application}, user {user}), {held}"),
        HolderKind::Standby => format!("the standby {application} (pid {name}), {held}"),
        HolderKind::Prepared => format!("the prepared transaction {name} of user {user}, {held}"),
        HolderKind::Slot => format!("the replication slot {name}, {held}"),
        HolderKind::IdleSlot => format!("the replication slot {name}, which no client uses, {held}"),
    }
}

fn describe_with_remedy(holder: &VacuumHolder) -> String {
    let id = &holder.name;
    let remedy = match holder.holding {
        HolderKind::Session => format!("end it, if need be with SELECT pg_terminate_backend({id})"),
        HolderKind::Standby | HolderKind::Slot => "end the long queries on the standby".to_owned(),
        HolderKind::Prepared => format!("COMMIT PREPARED or ROLLBACK PREPARED '{id}'"),
        HolderKind::IdleSlot => format!("SELECT pg_drop_replication_slot('{id}') if it is no longer needed"),
    };
    format!("{} ({remedy})", describe(holder))
}

async fn check_notification_queue(report: &mut Report, store: &Store) {
    let Some((used, oldest)) = report.answer_or_fail(store.notification_queue().await, ADVICE) else { return };
    let found = format!("PostgreSQL's queue of notifications is {:.0} % full", used * 100.0);
    if used > 0.5 {
        let oldest = oldest.map_or_else(|| "not to be seen now".to_owned(), |oldest| format!("that of {oldest}"));
        report.warn(format_args!(
            "{found}; when it is full, writers fail. A listening session does not end its transaction; the oldest transaction is {oldest}: end it"
        ));
    } else {
        report.ok(found);
    }
}

async fn check_rows(report: &mut Report, store: &Store) {
    if let Some(late) = report.answer_or_fail(store.late(LATE).await, ADVICE) {
        match late {
            None => report.ok(format_args!("no row has been due for more than {} s", LATE.as_secs())),
            Some(late) => report.fail(format_args!(
                "{} rows have been due for more than {} s, the oldest, {} of the kind {}, for {}{}: see that a daemon runs, and what its log says",
                format_count(late.rows),
                LATE.as_secs(),
                late.oldest,
                late.kind,
                format_age(late.overdue),
                late.last_error.map(|error| format!(" ({error})")).unwrap_or_default()
            )),
        }
    }
    let paused = report.answer_or_fail(store.pauses().await, ADVICE).unwrap_or_default();
    for pause in &paused {
        report.note(format_args!("{}; to go on: `tidings resume {}`", pause_sentence(pause), pause.kind));
    }
    if let Some(mut held) = report.answer_or_fail(store.held_by_kind().await, ADVICE) {
        held.retain(|(kind, _)| paused.iter().all(|pause| pause.kind != *kind));
        if held.is_empty() {
            report.ok("no row is held");
        } else {
            let kinds: Vec<String> =
                held.iter().map(|(kind, rows)| format!("{} of the kind {kind}", format_count(*rows))).collect();
            report.warn(format_args!(
                "rows are held, since no daemon has a plugin for them: {}; put the plugin into the plugin directory",
                kinds.join(", ")
            ));
        }
    }
    if let Some(parked) = report.answer_or_fail(store.count_parked().await, ADVICE) {
        if parked == 0 {
            report.ok("no row is parked");
        } else {
            report.note(format_args!("{} rows are parked; `tidings parked list` says why", format_count(parked)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_that_differs_by_more_than_a_second_in_either_direction_is_a_warning() {
        for sign in [1, -1] {
            let level = |ms: i64| skew_level(time::Duration::milliseconds(sign * ms));
            assert_eq!([level(99), level(100), level(1_000)], [Level::Ok, Level::Note, Level::Note]);
            assert_eq!(level(1_001), Level::Warn);
        }
    }

    #[test]
    fn a_holder_of_a_snapshot_is_named_with_what_to_do() {
        let holder = |holding| VacuumHolder {
            holding,
            name: "42".into(),
            application: "psql".into(),
            user: "bob".into(),
            age: Some(Duration::from_secs(422)),
            behind: 7,
        };
        assert_eq!(
            describe_with_remedy(&holder(HolderKind::Session)),
            "the session with the pid 42 (psql, user bob), for 7m 2s (end it, if need be with SELECT pg_terminate_backend(42))"
        );
        assert!(describe_with_remedy(&holder(HolderKind::Prepared)).contains("ROLLBACK PREPARED '42'"));
        let slot = VacuumHolder { age: None, ..holder(HolderKind::IdleSlot) };
        assert!(describe_with_remedy(&slot).contains("7 transactions behind (SELECT pg_drop_replication_slot('42')"));
    }
}
