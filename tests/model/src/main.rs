//! `cargo verify -- model`: drives the scheduler's core through worlds in virtual time, and checks the invariants in every
//! state. Small worlds are checked in every order of their steps, large worlds with random steps.

mod daemon;
mod diary;
mod invariant;
mod mutants;
mod process;
mod random;
mod row;
mod server;
mod small;
mod step;
mod times;
mod trace;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

/// Checks the scheduler's core in worlds of virtual time.
#[derive(Parser)]
struct Arguments {
    /// The seed of the large worlds: the same seed makes the same worlds.
    #[arg(long, default_value_t = 18)]
    seed: u64,
    /// The number of steps of all large worlds together. Leaves out the small worlds.
    #[arg(long)]
    steps: Option<u64>,
    /// Does not shrink a failing world to the fewest steps.
    #[arg(long)]
    brief: bool,
    /// Prints the core's events and actions for one row, and nothing else.
    #[arg(long)]
    trace: bool,
    /// Puts faults into a copy of the core one by one, and prints which invariant each violates.
    #[arg(long)]
    mutants: bool,
}

fn main() -> ExitCode {
    let Arguments { seed, steps, brief, trace, mutants } = Arguments::parse();
    if trace {
        print!("{}", trace::trace_one_row());
        return ExitCode::SUCCESS;
    }
    let passed = if mutants {
        mutants::run(seed, steps.unwrap_or(1_000_000)).unwrap_or_else(|error| {
            println!("could not make the copy of the core: {error}");
            false
        })
    } else {
        (steps.is_some() || small::check_all()) && check_large(seed, steps.unwrap_or(1_000_000), brief)
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Checks the large worlds. Returns whether no invariant is violated.
fn check_large(seed: u64, steps: u64, brief: bool) -> bool {
    let began = Instant::now();
    match random::run(seed, steps, brief) {
        Ok(random::Run { steps, worlds }) => {
            let seconds = began.elapsed().as_secs_f64();
            println!(
                "large worlds: seed {seed}, {worlds} worlds, {steps} steps, no invariant violated, {seconds:.1} s"
            );
            true
        }
        Err((violation, report)) => {
            if let Some(violation) = violation {
                println!("violated: {}", violation.invariant);
            }
            println!("large worlds, seed {seed}: {report}");
            false
        }
    }
}
