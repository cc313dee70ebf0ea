//! Prints what a run has shown.

use std::collections::BTreeMap;

use crate::ledger::{Fault, Verdict};
use crate::nemesis::Nemesis;
use crate::recurrences::Instants;

/// Prints how many messages an intake was given, and which of them never became a row.
pub(crate) fn report_intake(taken: usize, not_taken: &[(uuid::Uuid, i64)], faults: &[Fault]) {
    println!("intake: {taken} messages were confirmed, {} of them never became a row", not_taken.len());
    for (id, at_ms) in not_taken.iter().take(20) {
        let fault = faults.iter().rev().find(|fault| fault.from_ms <= *at_ms);
        let since = fault.map(|fault| format!("{} ms after the beginning of: {}", at_ms - fault.from_ms, fault.name));
        println!("  {id} was confirmed {}", since.unwrap_or_else(|| "before the first fault".into()));
    }
}

/// Prints by how many rows a limit was exceeded. A row whose message was confirmed and whose transaction was lost counts when it is
/// finished, so a fault may let a few rows more go.
pub(crate) fn report_limit(sent: &[f64], limit: u32, burst: u32) {
    let excess = harness::windows::excess(sent, f64::from(limit), f64::from(burst));
    println!("{excess:>8}  rows more than the limit allows in the busiest of all windows, of {} rows", sent.len());
}

/// Prints which instants of recurrences were made.
pub(crate) fn report_instants(Instants { expected, missing, wrong }: &Instants) {
    println!("\n{expected:>8}  instants of recurrences");
    for (name, instants) in [("not made", missing), ("made twice, or that no rule says", wrong)] {
        let example = instants.first().map_or(String::new(), |first| format!(", for example {first}"));
        println!("{:>8}  {name}{example}", instants.len());
    }
}

/// Prints how many rows the producers were told are committed, and which of them the database lacks.
pub(crate) fn report_confirmed(confirmed: usize, missing: &[uuid::Uuid]) {
    let example = missing.first().map_or(String::new(), |id| format!(", for example {id}"));
    println!(
        "{confirmed:>8}  rows whose commit was confirmed, {} of them are not in the database{example}",
        missing.len()
    );
}

/// Prints the faults, what became of the rows, and how late they were.
pub(crate) fn report(verdict: &Verdict, nemesis: &Nemesis) {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for fault in &nemesis.faults {
        *kinds.entry(fault.name).or_default() += 1;
    }
    let Verdict { committed, cancelled, arrived, expired, replayed, stale, duplicates, .. } = verdict;
    println!(
        "\n{} faults, each with the second copies that it caused, and the time until lateness was below 1 s again:",
        nemesis.faults.len()
    );
    for (name, count) in kinds {
        let doubled = duplicates.get(name).copied().unwrap_or_default();
        let mut normal = verdict.normal_after.get(name).cloned().unwrap_or_default();
        normal.sort_unstable();
        let (median, most) = (normal.get(normal.len() / 2).copied().unwrap_or(0), normal.last().copied().unwrap_or(0));
        println!("{count:>8}  {name:<32} {doubled:>6}   median {median:>6} ms   most {most:>6} ms");
    }
    let duplicates: usize = duplicates.values().sum();
    let lines: usize = nemesis.daemons.iter().map(|victim| victim.log().lines().count()).sum();
    println!("{lines:>8}  lines in the daemons' logs");
    println!("\n{committed:>8}  rows committed");
    println!("{arrived:>8}  arrived, {replayed} replays on top");
    println!("{cancelled:>8}  cancelled or moved");
    println!("{expired:>8}  expired before they arrived");
    println!("{stale:>8}  arrived after their deadline, and were not handled");
    let rate = f64::from(u32::try_from(duplicates).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(*committed).unwrap_or(1))
        * 100.0;
    println!("{duplicates:>8}  second copies with the same id, each explained by a fault ({rate:.3} % of rows)");
    for (name, ids) in [
        ("lost", &verdict.lost),
        ("early", &verdict.early),
        ("handled after the deadline", &verdict.after_deadline),
        ("arrived, but were never committed", &verdict.never_committed),
        ("were cancelled, and arrived without a fault", &verdict.cancelled_and_seen),
        ("second copies without a fault", &verdict.unexplained_duplicates),
        ("were rejected, and did not come again", &verdict.only_rejected),
    ] {
        println!("{:>8}  {name}{}", ids.len(), ids.first().map_or(String::new(), |id| format!(", for example {id}")));
    }
    println!("\nlateness at the consumer after due time and commit, by the fault at that time or up to 10 s before:");
    for (name, late) in &verdict.lateness {
        let mut late = late.clone();
        late.sort_unstable();
        let at = |percent: usize| late[(late.len() - 1) * percent / 100];
        println!("{:>8}  p50 {:>6} ms   p99 {:>6} ms   most {:>6} ms   {name}", late.len(), at(50), at(99), at(100));
    }
}
