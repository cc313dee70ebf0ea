//! Measures limits: whether two daemons together keep to one, whether it is used fully, and what rows that wait for their turn cost
//! rows of other kinds.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::windows::excess;
use time::OffsetDateTime;

use crate::load::{Stage, insert_trickle_sql, payload};
use crate::report::{Figure, Times};
use crate::{Bench, MILLION};

/// The rows that are due at once.
const ROWS: u32 = 20_000;
/// The limit of the kind, in rows a second, and how many may go at once.
const RATE: u32 = 500;
const BURST: u32 = 50;
/// The subjects; the first has one row, the last as many as there are subjects.
const SUBJECTS: u32 = 200;
/// The limit of each subject.
const SUBJECT_RATE: u32 = 10;
const SUBJECT_BURST: u32 = 5;
/// Subjects with at most so many rows are small.
const SMALL: u32 = 20;
/// How many rows a second of the limited kind go while rows of other kinds are measured.
const FEW: u32 = 10;
/// For how many seconds rows of other kinds fall due.
const SECONDS: u32 = 20;

/// Measures all of it.
pub(crate) async fn limits(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message", "game-status", "game-reminder"]).await;
    let daemons = [stage.start_daemon().await, stage.start_daemon().await];
    let mut figures = measure_kind(bench, &stage).await;
    figures.extend(measure_subjects(&stage).await);
    figures.extend(measure_beside(bench, &stage).await);
    for daemon in daemons {
        assert!(Daemon::stop(daemon).await.success());
    }
    stage.remove().await;
    figures
}

/// Many rows of one limited kind, due at once.
async fn measure_kind(bench: &Bench, stage: &Stage) -> Vec<Figure> {
    let rows = bench.rows(ROWS);
    let (mut excesses, mut took, mut ideals) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        stage.world.sql(&format!("SELECT tidings.limit('message', {RATE}, burst => {BURST})")).await;
        let written = stage.write(insert_sql("'everybody'", rows)).await;
        stage.wait_until_finished(rows).await;
        took.push((stage.last_confirm().await - written).as_seconds_f64());
        ideals.push(f64::from(rows - BURST) / f64::from(RATE));
        let sent = sent_seconds(stage, "true").await;
        excesses.push(excess(&sent, f64::from(RATE), f64::from(BURST)));
        stage.tidy().await;
    }
    let name = format!("{rows} rows, {RATE} a second, {BURST} at once, by two daemons");
    vec![
        Figure::new(format!("{name}: rows above the limit in any window"), "rows", excesses).at_most(0.0),
        Figure::new(format!("{name}: time for all"), "s", took).beside("ideal", ideals).at_most_share(1.02),
    ]
}

/// Rows of many subjects, each with a limit of its own, due at once.
async fn measure_subjects(stage: &Stage) -> Vec<Figure> {
    let limit = format!("SELECT tidings.limit('message', {SUBJECT_RATE}, burst => {SUBJECT_BURST}, by => 'subject')");
    stage.world.sql(&limit).await;
    let rows = SUBJECTS * (SUBJECTS + 1) / 2;
    // The number of the first subject that has this many rows or more, together with those before it.
    let written = stage.write(insert_sql("ceil((sqrt(8.0 * n + 1) - 1) / 2)::int", rows)).await;
    stage.wait_until_finished(rows).await;
    let (mut most, mut small, mut large) = (f64::MIN, Vec::new(), Vec::new());
    for subject in 1..=SUBJECTS {
        let sent = sent_seconds(stage, &format!("subject = '{subject}'")).await;
        assert_eq!(sent.len(), subject as usize, "the rows of the subject {subject}");
        most = most.max(excess(&sent, f64::from(SUBJECT_RATE), f64::from(SUBJECT_BURST)));
        let own = f64::from(subject.saturating_sub(SUBJECT_BURST)) / f64::from(SUBJECT_RATE);
        let written = seconds(written);
        let late = (sent[sent.len() - 1] - written - own) * 1_000.0;
        (if subject <= SMALL { &mut small } else { &mut large }).push(late);
    }
    stage.world.sql("SELECT tidings.unlimit('message')").await;
    stage.tidy().await;
    let name = format!("{SUBJECTS} subjects with 1 to {SUBJECTS} rows, {SUBJECT_RATE} a second each");
    let worst = |late: &[f64]| Times::new(late.iter().copied()).percentile(100);
    vec![
        Figure::new(format!("{name}: rows above the limit in any window"), "rows", [most]).at_most(0.0),
        Figure::new(format!("{name}: small subjects, later than their own time, most"), "ms", [worst(&small)]),
        Figure::new(format!("{name}: large subjects, later than their own time, most"), "ms", [worst(&large)]),
    ]
}

/// Rows of other kinds: without a backlog of a limited kind, beside as many rows of that kind of which equally many are delivered
/// without a limit, while its rows become due, and while they wait.
async fn measure_beside(bench: &Bench, stage: &Stage) -> Vec<Figure> {
    let (mut without, mut unlimited) = (Vec::new(), Vec::new());
    let (mut meanwhile, mut waiting, mut took) = (Vec::new(), Vec::new(), Vec::new());
    let backlog = bench.rows(MILLION);
    for _ in 0..bench.rounds() {
        without.push(measure_trickle(bench, stage).await);
        stage.write(insert_rows_sql("'everybody'", "now() + interval '30 d'", backlog)).await;
        settle(stage).await;
        let now = stage.world.now().await;
        let one_by_one = format!("'{now}'::timestamptz + interval '2 s' + n * interval '1 s' / {FEW}");
        stage.write(insert_rows_sql("'everybody'", &one_by_one, bench.seconds(SECONDS) * FEW)).await;
        unlimited.push(measure_trickle_from(bench, stage, now).await);
        stage.world.sql("TRUNCATE tidings.schedules").await;
        stage.tidy().await;
        stage.world.sql(&format!("SELECT tidings.limit('message', {FEW})")).await;
        let (written, begun) = (stage.write(insert_sql("'everybody'", backlog)).await, Instant::now());
        meanwhile.push(measure_trickle_from(bench, stage, written).await);
        let moved = "SELECT count(*) < 1000 FROM tidings.schedules WHERE kind = 'message' AND line IS NULL";
        while !stage.world.value::<bool>(moved).await {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        took.push(begun.elapsed().as_secs_f64());
        settle(stage).await;
        waiting.push(measure_trickle(bench, stage).await);
        stage.world.sql("TRUNCATE tidings.schedules, tidings.lines").await;
        stage.world.sql("SELECT tidings.unlimit('message')").await;
        stage.tidy().await;
    }
    let figure = |name: &str, times: &[Times], percent, (beside, others): (&str, &[Times])| {
        let at = |times: &[Times]| times.iter().map(|times| times.percentile(percent)).collect::<Vec<f64>>();
        Figure::new(format!("{name}, p{percent}"), "ms", at(times)).beside(beside, at(others))
    };
    let alone: (&str, &[Times]) = ("without these rows", &without);
    let as_many: (&str, &[Times]) = ("as many rows without a limit", &unlimited);
    let while_due = format!("other kinds while {backlog} rows of a limited kind become due");
    let while_waiting = format!("other kinds while {backlog} rows wait for their turn");
    let beside_others = format!("other kinds beside {backlog} rows without a limit, {FEW} a second due");
    vec![
        Figure::new(format!("{backlog} rows, until they are in their line"), "s", took),
        figure(&while_due, &meanwhile, 50, alone),
        figure(&while_due, &meanwhile, 99, alone),
        figure(&beside_others, &unlimited, 50, alone),
        figure(&beside_others, &unlimited, 99, alone),
        figure(&while_waiting, &waiting, 50, alone).at_most_share(1.2),
        figure(&while_waiting, &waiting, 99, alone).at_most_share(1.2),
        figure(&while_waiting, &waiting, 50, as_many),
        figure(&while_waiting, &waiting, 99, as_many),
    ]
}

/// Leaves nothing to vacuum and to write that would disturb a measurement.
async fn settle(stage: &Stage) {
    stage.world.sql("VACUUM ANALYZE tidings.schedules").await;
    stage.world.sql("CHECKPOINT").await;
}

async fn measure_trickle(bench: &Bench, stage: &Stage) -> Times {
    let now = stage.world.now().await;
    measure_trickle_from(bench, stage, now).await
}

/// The lateness of rows of other kinds that fall due from two seconds after `from` on.
async fn measure_trickle_from(bench: &Bench, stage: &Stage, from: OffsetDateTime) -> Times {
    let rows = bench.seconds(SECONDS) * crate::lateness::TRICKLE;
    stage.world.sql(&insert_trickle_sql(from + Duration::from_secs(4), rows)).await;
    let all = format!(
        "SELECT count(*) = {rows} FROM tidings.deliveries WHERE kind <> 'message' AND due_at > '{from}'::timestamptz"
    );
    let finished = async || stage.world.value::<bool>(&all).await.then_some(());
    harness::eventually_within(Duration::from_mins(10), "the rows of other kinds", finished).await;
    stage.lateness(&format!("kind <> 'message' AND due_at > '{from}'::timestamptz")).await
}

/// The statement that writes rows of the limited kind, one microsecond after the other, all due by now.
fn insert_sql(subject: &str, rows: u32) -> String {
    insert_rows_sql(subject, "now() - interval '2 s' + n * interval '1 us'", rows)
}

/// The statement that writes rows of that kind; `n` counts from 1.
fn insert_rows_sql(subject: &str, due: &str, rows: u32) -> String {
    format!(
        "INSERT INTO tidings.schedules (kind, subject, due_at, payload)
         SELECT 'message', {subject}, {due}, '{}' FROM generate_series(1, {rows}) AS n",
        payload()
    )
}

/// When the messages were confirmed of the deliveries that a condition selects, in seconds, in order.
async fn sent_seconds(stage: &Stage, which: &str) -> Vec<f64> {
    let sent = format!(
        "SELECT coalesce(array_agg(extract(epoch FROM finished_at)::float8 ORDER BY finished_at), '{{}}')
         FROM tidings.deliveries WHERE outcome = 'delivered' AND kind = 'message' AND {which}"
    );
    stage.world.value(&sent).await
}

fn seconds(at: OffsetDateTime) -> f64 {
    (at - OffsetDateTime::UNIX_EPOCH).as_seconds_f64()
}
