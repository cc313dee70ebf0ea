//! `cargo verify -- model`: drives the scheduler's core through worlds of virtual time, and says what is wrong in any state.
//! Small worlds are gone through in every order, large ones at random.

mod daemon;
mod diary;
mod invariant;
mod life;
mod mutants;
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
    /// What the large worlds are made from: the same seed makes the same worlds.
    #[arg(long, default_value_t = 18)]
    seed: u64,
    /// The steps of all large worlds together; with it the small worlds are left out.
    #[arg(long)]
    steps: Option<u64>,
    /// Does not shrink a failing world to the fewest steps.
    #[arg(long)]
    brief: bool,
    /// Prints the life of one row, as the core sees it, and nothing else.
    #[arg(long)]
    trace: bool,
    /// Puts faults into copies of the core, and says which invariant names each.
    #[arg(long)]
    mutants: bool,
}

fn main() -> ExitCode {
    let Arguments { seed, steps, brief, trace, mutants } = Arguments::parse();
    if trace {
        print!("{}", trace::of_one_row());
        return ExitCode::SUCCESS;
    }
    let well = if mutants {
        mutants::run(seed, steps.unwrap_or(1_000_000)).unwrap_or_else(|error| {
            println!("the copy of the core cannot be made: {error}");
            false
        })
    } else {
        (steps.is_some() || small::check_all()) && check_large(seed, steps.unwrap_or(1_000_000), brief)
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether nothing is wrong in the large worlds.
fn check_large(seed: u64, steps: u64, brief: bool) -> bool {
    let began = Instant::now();
    match random::run(seed, steps, brief) {
        Ok(random::Run { steps, worlds }) => {
            let seconds = began.elapsed().as_secs_f64();
            println!(
                "large worlds: seed {seed}, {worlds} worlds, {steps} steps, nothing wrong in any state, {seconds:.1} s"
            );
            true
        }
        Err((wrong, sentence)) => {
            if let Some(wrong) = wrong {
                println!("wrong: {}", wrong.invariant);
            }
            println!("large worlds, seed {seed}: {sentence}");
            false
        }
    }
}
