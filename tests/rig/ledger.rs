//! Compares what was scheduled with what arrived. The producers' ledger is a table that is committed together with the
//! rows; the consumers' ledgers are files that are written before a message is acknowledged. The verdict lists every
//! difference.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Context as _;
use sqlx::postgres::PgPool;
use uuid::Uuid;

/// The tables of the producers' ledger. A row is in `rig.scheduled` if, and only if, its schedule was committed.
pub(crate) const TABLES: &str = "
    CREATE SCHEMA rig;
    CREATE TABLE rig.scheduled (id uuid PRIMARY KEY, due_at timestamptz NOT NULL, expires_at timestamptz);
    CREATE TABLE rig.cancelled (id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())";

/// How long after the end of a fault a second copy that it caused may still arrive: the daemon waits ten seconds for a
/// confirm, and gives up the connections of a frozen server after twenty.
const DUPLICATES_MS: i64 = 40_000;
/// How long after the end of a fault a row may still be late because of it.
const DELAYS_MS: i64 = 10_000;

/// A row is late if it arrives more than this after it was due and committed.
const LATE_MS: i64 = 1_000;

/// A fault, with its start and end in ms since the Unix epoch.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) name: &'static str,
    /// Whether a message may arrive twice because of this fault.
    pub(crate) may_duplicate: bool,
    pub(crate) from_ms: i64,
    pub(crate) until_ms: i64,
}

/// The arrival of a message at a consumer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) at_ms: i64,
    pub(crate) due_ms: i64,
    pub(crate) expires_ms: Option<i64>,
    pub(crate) replay: i64,
    /// RabbitMQ marked the message as redelivered.
    pub(crate) redelivered: bool,
    /// The consumer handled the message. Otherwise it rejected the message, or found it past its deadline.
    pub(crate) handled: bool,
}

impl Arrival {
    pub(crate) fn line(&self, id: Uuid) -> String {
        let Self { at_ms, due_ms, expires_ms, replay, redelivered, handled } = self;
        let expires_ms = expires_ms.unwrap_or(i64::MAX);
        format!("{id} {at_ms} {due_ms} {expires_ms} {replay} {} {}\n", u8::from(*redelivered), u8::from(*handled))
    }

    fn parse(line: &str) -> Option<(Uuid, Self)> {
        let mut parts = line.split(' ');
        let id = parts.next()?.parse().ok()?;
        let mut number = || parts.next()?.parse::<i64>().ok();
        let (at_ms, due_ms, expires_ms, replay) = (number()?, number()?, number()?, number()?);
        let (redelivered, handled) = (number()? == 1, number()? == 1);
        let expires_ms = Some(expires_ms).filter(|ms| *ms != i64::MAX);
        Some((id, Self { at_ms, due_ms, expires_ms, replay, redelivered, handled }))
    }
}

/// Reads all arrivals from the consumers' files, by message id and in the order of time.
pub(crate) fn read_arrivals(dir: &Path) -> anyhow::Result<HashMap<Uuid, Vec<Arrival>>> {
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

/// The result of the comparison. The lists of ids must be empty; `duplicates` need not be.
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
    /// Rows that were cancelled and arrived, although there was no fault between their due time and the cancellation.
    pub(crate) cancelled_and_seen: Vec<Uuid>,
    /// Rows without a deadline that has passed, which the consumers have only rejected. A lone RabbitMQ may lose a dead letter,
    /// so that this is a broken promise only in a cluster.
    pub(crate) only_rejected: Vec<Uuid>,
    /// The number of second copies of messages, by the fault that explains them.
    pub(crate) duplicates: BTreeMap<&'static str, usize>,
    pub(crate) unexplained_duplicates: Vec<Uuid>,
    /// The lateness of rows in ms, by the fault at that time.
    pub(crate) lateness: BTreeMap<&'static str, Vec<i64>>,
    /// For each kind of fault: how many ms after the end of each such fault rows were still late.
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

/// A row of the producers' ledger; times in ms since the Unix epoch.
#[derive(sqlx::FromRow)]
struct Scheduled {
    id: Uuid,
    due_ms: i64,
    committed_ms: i64,
    expires_ms: Option<i64>,
    cancelled_ms: Option<i64>,
    /// `tidings.deliveries` has the row as expired.
    expired: bool,
}

/// Compares what was committed with what arrived.
pub(crate) async fn judge(
    db: &PgPool,
    arrivals: &HashMap<Uuid, Vec<Arrival>>,
    faults: &[Fault],
) -> anyhow::Result<Verdict> {
    let ms = |name: &str| format!("(extract(epoch FROM {name}) * 1000)::bigint");
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
        let is_rejected = !seen.is_empty() && !seen.iter().any(|arrival| arrival.handled);
        if is_rejected && row.expires_ms.is_none_or(|expires_ms| expires_ms > now_ms) {
            verdict.only_rejected.push(row.id);
        }
        if let Some(cancelled_ms) = row.cancelled_ms.filter(|_| !seen.is_empty())
            && find_duplicating_fault(faults, row.due_ms, cancelled_ms).is_none()
        {
            verdict.cancelled_and_seen.push(row.id);
        }
        verdict.add_arrivals(&row, seen, faults);
        // The lateness is attributed to the last fault that began before the arrival.
        if let Some(first) = seen.first().filter(|first| first.at_ms - row.ready_ms() > LATE_MS)
            && let Some(last) = faults.iter().rposition(|fault| fault.from_ms <= first.at_ms)
        {
            late_until[last] = late_until[last].max(row.ready_ms() - faults[last].until_ms);
        }
    }
    for (fault, until) in faults.iter().zip(late_until) {
        verdict.normal_after.entry(fault.name).or_default().push(until);
    }
    verdict.never_committed.extend(unknown);
    Ok(verdict)
}

impl Scheduled {
    /// The first moment at which the row could be delivered: when it was due and committed.
    fn ready_ms(&self) -> i64 {
        self.due_ms.max(self.committed_ms)
    }
}

impl Verdict {
    fn add_arrivals(&mut self, row: &Scheduled, seen: &[Arrival], faults: &[Fault]) {
        let id = row.id;
        let mut copies: BTreeMap<i64, &Arrival> = BTreeMap::new();
        for arrival in seen {
            if arrival.at_ms < arrival.due_ms {
                self.early.push(id);
            }
            let past = arrival.expires_ms.is_some_and(|at| at <= arrival.at_ms);
            self.stale += usize::from(past);
            if past && arrival.handled {
                self.after_deadline.push(id);
            }
            self.replayed += usize::from(arrival.replay > 0);
            // A redelivery by RabbitMQ is not a second message.
            if arrival.redelivered {
                continue;
            }
            if copies.insert(arrival.replay, arrival).is_some() {
                match find_duplicating_fault(faults, arrival.due_ms, arrival.at_ms) {
                    Some(name) => *self.duplicates.entry(name).or_default() += 1,
                    None => self.unexplained_duplicates.push(id),
                }
            }
        }
        if let Some(first) = seen.first() {
            let class = find_fault_class(faults, row.ready_ms(), first.at_ms);
            self.lateness.entry(class).or_default().push(first.at_ms - row.ready_ms());
        }
    }
}

/// The last fault in this period, or at most `DUPLICATES_MS` before it, because of which a message may arrive twice.
fn find_duplicating_fault(faults: &[Fault], from_ms: i64, until_ms: i64) -> Option<&'static str> {
    let may = |fault: &&Fault| fault.may_duplicate && fault.overlaps(from_ms, until_ms, DUPLICATES_MS);
    faults.iter().rev().find(may).map(|fault| fault.name)
}

/// The fault that was present in this period, or ended at most `DELAYS_MS` before it.
fn find_fault_class(faults: &[Fault], from_ms: i64, until_ms: i64) -> &'static str {
    let mut broken = faults.iter().filter(|fault| fault.overlaps(from_ms, until_ms, DELAYS_MS));
    let Some(first) = broken.next() else { return "no fault" };
    if broken.all(|fault| fault.name == first.name) { first.name } else { "several faults" }
}

impl Fault {
    fn overlaps(&self, from_ms: i64, until_ms: i64, aftermath_ms: i64) -> bool {
        self.from_ms <= until_ms && from_ms <= self.until_ms.saturating_add(aftermath_ms)
    }
}
