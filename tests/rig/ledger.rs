//! What must come of it, and what came: the producers' ledger is a table that commits together with the rows, the
//! consumers' are files that are written before anything is acknowledged. The verdict compares them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Context as _;
use sqlx::postgres::PgPool;
use uuid::Uuid;

/// The table of what was committed. A row is here if, and only if, its schedule was written.
pub(crate) const TABLES: &str = "
    CREATE SCHEMA rig;
    CREATE TABLE rig.scheduled (id uuid PRIMARY KEY, due_at timestamptz NOT NULL, expires_at timestamptz);
    CREATE TABLE rig.cancelled (id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())";

/// After a fault is over, what it doubled may still arrive this much later: a confirm is awaited for ten seconds, and a frozen
/// server's connections are given up after twenty.
const DOUBLES_MS: i64 = 40_000;
/// And what it delayed is still late for as long: everything is back to normal after this.
const DELAYS_MS: i64 = 10_000;

/// A row that arrives later than this after it could be delivered is late.
const LATE_MS: i64 = 1_000;

/// A time in which something was broken, in ms since the Unix epoch.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) what: &'static str,
    /// Whether a message may arrive twice because of it.
    pub(crate) doubles: bool,
    pub(crate) from_ms: i64,
    pub(crate) until_ms: i64,
}

/// A message as a consumer saw it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) at_ms: i64,
    pub(crate) due_ms: i64,
    pub(crate) expires_ms: Option<i64>,
    pub(crate) replay: i64,
    /// The broker says that it has handed it out before.
    pub(crate) redelivered: bool,
    /// The consumer did what it says; otherwise it rejected it, or found it stale.
    pub(crate) acted: bool,
}

impl Arrival {
    pub(crate) fn line(&self, id: Uuid) -> String {
        let Self { at_ms, due_ms, expires_ms, replay, redelivered, acted } = self;
        let expires_ms = expires_ms.unwrap_or(i64::MAX);
        format!("{id} {at_ms} {due_ms} {expires_ms} {replay} {} {}\n", u8::from(*redelivered), u8::from(*acted))
    }

    fn parse(line: &str) -> Option<(Uuid, Self)> {
        let mut parts = line.split(' ');
        let id = parts.next()?.parse().ok()?;
        let mut number = || parts.next()?.parse::<i64>().ok();
        let (at_ms, due_ms, expires_ms, replay) = (number()?, number()?, number()?, number()?);
        let (redelivered, acted) = (number()? == 1, number()? == 1);
        let expires_ms = Some(expires_ms).filter(|ms| *ms != i64::MAX);
        Some((id, Self { at_ms, due_ms, expires_ms, replay, redelivered, acted }))
    }
}

/// Everything that arrived, in the order of time.
pub(crate) fn arrivals(dir: &Path) -> anyhow::Result<HashMap<Uuid, Vec<Arrival>>> {
    let mut arrivals: HashMap<Uuid, Vec<Arrival>> = HashMap::new();
    for entry in std::fs::read_dir(dir)? {
        let file = entry?.path();
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        for line in text.lines() {
            let (id, arrival) = Arrival::parse(line).with_context(|| format!("{}: {line}", file.display()))?;
            arrivals.entry(id).or_default().push(arrival);
        }
    }
    for arrivals in arrivals.values_mut() {
        arrivals.sort_by_key(|arrival| arrival.at_ms);
    }
    Ok(arrivals)
}

/// What was found. Everything but `duplicates` must be zero.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) committed: usize,
    pub(crate) cancelled: usize,
    pub(crate) arrived: usize,
    pub(crate) expired: usize,
    pub(crate) replayed: usize,
    pub(crate) stale: usize,
    pub(crate) lost: Vec<Uuid>,
    pub(crate) early: Vec<Uuid>,
    pub(crate) after_deadline: Vec<Uuid>,
    pub(crate) never_committed: Vec<Uuid>,
    /// Cancelled, and arrived although nothing was broken between its due time and the cancellation.
    pub(crate) cancelled_and_seen: Vec<Uuid>,
    /// Second copies of a message, by the fault in whose window each is.
    pub(crate) duplicates: BTreeMap<&'static str, usize>,
    pub(crate) unexplained_duplicates: Vec<Uuid>,
    /// In ms, by what was broken at the time.
    pub(crate) lateness: BTreeMap<&'static str, Vec<i64>>,
    /// By fault: for how many ms after each the rows that became deliverable were late.
    pub(crate) normal_after: BTreeMap<&'static str, Vec<i64>>,
}

impl Verdict {
    /// Whether every promise was kept.
    pub(crate) fn is_clean(&self) -> bool {
        [
            &self.lost,
            &self.early,
            &self.after_deadline,
            &self.never_committed,
            &self.cancelled_and_seen,
            &self.unexplained_duplicates,
        ]
        .iter()
        .all(|broken| broken.is_empty())
    }
}

/// What the database knows of a row; times in ms since the Unix epoch.
#[derive(sqlx::FromRow)]
struct Scheduled {
    id: Uuid,
    due_ms: i64,
    committed_ms: i64,
    expires_ms: Option<i64>,
    cancelled_ms: Option<i64>,
    /// The history says that it expired.
    expired: bool,
}

/// Compares what was committed with what arrived.
pub(crate) async fn judge(
    db: &PgPool,
    arrivals: &HashMap<Uuid, Vec<Arrival>>,
    faults: &[Fault],
) -> anyhow::Result<Verdict> {
    let ms = |what: &str| format!("(extract(epoch FROM {what}) * 1000)::bigint");
    let scheduled = format!(
        "SELECT s.id, {} AS due_ms, {} AS committed_ms, {} AS expires_ms, {} AS cancelled_ms,
                coalesce((SELECT outcome = 'expired' FROM tidings.deliveries d WHERE d.id = s.id LIMIT 1), false) AS expired
         FROM rig.scheduled s LEFT JOIN rig.cancelled c USING (id)",
        ms("due_at"),
        ms("pg_xact_commit_timestamp(s.xmin)"),
        ms("expires_at"),
        ms("c.at")
    );
    let rows: Vec<Scheduled> = sqlx::query_as(sqlx::AssertSqlSafe(scheduled)).fetch_all(db).await?;
    let now_ms: i64 =
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT {}", ms("clock_timestamp()")))).fetch_one(db).await?;
    let mut verdict = Verdict { committed: rows.len(), ..Verdict::default() };
    let mut unknown: std::collections::HashSet<Uuid> = arrivals.keys().copied().collect();
    let mut late_until = vec![0; faults.len()];
    for row in rows {
        unknown.remove(&row.id);
        let seen = arrivals.get(&row.id).map_or(&[][..], Vec::as_slice);
        verdict.cancelled += usize::from(row.cancelled_ms.is_some());
        verdict.arrived += usize::from(!seen.is_empty());
        verdict.expired += usize::from(seen.is_empty() && row.expired);
        let may_be_gone =
            row.cancelled_ms.is_some() || row.expired || row.expires_ms.is_some_and(|expires_ms| expires_ms <= now_ms);
        if seen.is_empty() && !may_be_gone {
            verdict.lost.push(row.id);
        }
        if let Some(cancelled_ms) = row.cancelled_ms.filter(|_| !seen.is_empty())
            && doubling(faults, row.due_ms, cancelled_ms).is_none()
        {
            verdict.cancelled_and_seen.push(row.id);
        }
        verdict.add(&row, seen, faults);
        // The last fault before it arrived has to answer for it.
        if let Some(first) = seen.first().filter(|first| first.at_ms - row.ready_ms() > LATE_MS)
            && let Some(last) = faults.iter().rposition(|fault| fault.from_ms <= first.at_ms)
        {
            late_until[last] = late_until[last].max(row.ready_ms() - faults[last].until_ms);
        }
    }
    for (fault, until) in faults.iter().zip(late_until) {
        verdict.normal_after.entry(fault.what).or_default().push(until);
    }
    verdict.never_committed.extend(unknown);
    Ok(verdict)
}

impl Scheduled {
    /// From when on it could be delivered.
    fn ready_ms(&self) -> i64 {
        self.due_ms.max(self.committed_ms)
    }
}

impl Verdict {
    fn add(&mut self, row: &Scheduled, seen: &[Arrival], faults: &[Fault]) {
        let id = row.id;
        let mut copies: BTreeMap<i64, &Arrival> = BTreeMap::new();
        for arrival in seen {
            if arrival.at_ms < arrival.due_ms {
                self.early.push(id);
            }
            let past = arrival.expires_ms.is_some_and(|at| at <= arrival.at_ms);
            self.stale += usize::from(past);
            if past && arrival.acted {
                self.after_deadline.push(id);
            }
            self.replayed += usize::from(arrival.replay > 0);
            // What the broker hands out again is no second message.
            if arrival.redelivered {
                continue;
            }
            if copies.insert(arrival.replay, arrival).is_some() {
                match doubling(faults, arrival.due_ms, arrival.at_ms) {
                    Some(what) => *self.duplicates.entry(what).or_default() += 1,
                    None => self.unexplained_duplicates.push(id),
                }
            }
        }
        if let Some(first) = seen.first() {
            let class = class(faults, row.ready_ms(), first.at_ms);
            self.lateness.entry(class).or_default().push(first.at_ms - row.ready_ms());
        }
    }
}

/// The last fault in this time, or shortly before, because of which a message may arrive twice.
fn doubling(faults: &[Fault], from_ms: i64, until_ms: i64) -> Option<&'static str> {
    let may = |fault: &&Fault| fault.doubles && fault.overlaps(from_ms, until_ms, DOUBLES_MS);
    faults.iter().rev().find(may).map(|fault| fault.what)
}

/// What was broken, or just mended, in this time.
fn class(faults: &[Fault], from_ms: i64, until_ms: i64) -> &'static str {
    let mut broken = faults.iter().filter(|fault| fault.overlaps(from_ms, until_ms, DELAYS_MS));
    let Some(first) = broken.next() else { return "nothing" };
    if broken.all(|fault| fault.what == first.what) { first.what } else { "several things" }
}

impl Fault {
    fn overlaps(&self, from_ms: i64, until_ms: i64, aftermath_ms: i64) -> bool {
        self.from_ms <= until_ms && from_ms <= self.until_ms.saturating_add(aftermath_ms)
    }
}
