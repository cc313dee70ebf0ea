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

/// A time in which something was broken, in ms since the Unix epoch.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) what: &'static str,
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
    /// Second copies of a message, each of which has a fault in its window.
    pub(crate) duplicates: usize,
    pub(crate) unexplained_duplicates: Vec<Uuid>,
    /// In ms, by what was broken at the time; "-" = nothing.
    pub(crate) lateness: BTreeMap<&'static str, Vec<i64>>,
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

/// An id, its times (due, deadline, cancelled) in ms, and whether the history says that it expired.
type Scheduled = (Uuid, i64, Option<i64>, Option<i64>, bool);

/// Compares what was committed with what arrived.
pub(crate) async fn judge(
    db: &PgPool,
    arrivals: &HashMap<Uuid, Vec<Arrival>>,
    faults: &[Fault],
) -> anyhow::Result<Verdict> {
    let ms = |what: &str| format!("(extract(epoch FROM {what}) * 1000)::bigint");
    let scheduled = format!(
        "SELECT s.id, {}, {}, {}, coalesce((SELECT outcome = 'expired' FROM tidings.deliveries d WHERE d.id = s.id LIMIT 1), false)
         FROM rig.scheduled s LEFT JOIN rig.cancelled c USING (id)",
        ms("due_at"),
        ms("expires_at"),
        ms("c.at")
    );
    let rows: Vec<Scheduled> = sqlx::query_as(sqlx::AssertSqlSafe(scheduled)).fetch_all(db).await?;
    let now_ms: i64 =
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT {}", ms("clock_timestamp()")))).fetch_one(db).await?;
    let mut verdict = Verdict { committed: rows.len(), ..Verdict::default() };
    let mut unknown: std::collections::HashSet<Uuid> = arrivals.keys().copied().collect();
    for (id, due_ms, expires_ms, cancelled_ms, expired) in rows {
        unknown.remove(&id);
        let seen = arrivals.get(&id).map_or(&[][..], Vec::as_slice);
        verdict.cancelled += usize::from(cancelled_ms.is_some());
        verdict.arrived += usize::from(!seen.is_empty());
        verdict.expired += usize::from(seen.is_empty() && expired);
        let accounted =
            !seen.is_empty() || cancelled_ms.is_some() || expired || expires_ms.is_some_and(|at| at <= now_ms);
        if !accounted {
            verdict.lost.push(id);
        }
        if let Some(cancelled_ms) = cancelled_ms.filter(|_| !seen.is_empty())
            && during(faults, due_ms, cancelled_ms, DOUBLES_MS).is_none()
        {
            verdict.cancelled_and_seen.push(id);
        }
        verdict.add(id, seen, faults);
    }
    verdict.never_committed.extend(unknown);
    Ok(verdict)
}

impl Verdict {
    fn add(&mut self, id: Uuid, seen: &[Arrival], faults: &[Fault]) {
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
                match during(faults, arrival.due_ms, arrival.at_ms, DOUBLES_MS) {
                    Some(_) => self.duplicates += 1,
                    None => self.unexplained_duplicates.push(id),
                }
            }
        }
        if let Some(first) = seen.first() {
            let broken = during(faults, first.due_ms, first.at_ms, DELAYS_MS);
            self.lateness.entry(broken.unwrap_or("-")).or_default().push(first.at_ms - first.due_ms);
        }
    }
}

/// What was broken, or just mended, in this time.
fn during(faults: &[Fault], from_ms: i64, until_ms: i64, aftermath_ms: i64) -> Option<&'static str> {
    let overlaps = |fault: &&Fault| fault.from_ms <= until_ms && from_ms <= fault.until_ms + aftermath_ms;
    faults.iter().rev().find(overlaps).map(|fault| fault.what)
}
