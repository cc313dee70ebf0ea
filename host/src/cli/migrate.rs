//! `tidings migrate`: creates or updates the schema, and spreads the rows over partitions.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::{SCHEMA, fail, fail_usage};
use crate::config::DatabaseArgs;
use crate::store::{Partitioned, SchemaError, Store};

/// What to migrate, and how far.
#[derive(Args, Debug)]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Makes `tidings.schedules` a table of so many partitions, by kind and key, or a plain table again (1); until it is done,
    /// nobody can write or deliver a row
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=128))]
    partitions: Option<u32>,
}

/// What `tidings migrate` answers.
#[derive(Debug, Serialize)]
struct Migrated {
    /// Host, port and name of the database.
    database: String,
    /// How many migrations ran.
    ran: usize,
    /// What was done to the partitions, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    partitions: Option<Partitions>,
}

/// What was done to the partitions.
#[derive(Debug, Serialize)]
struct Partitions {
    before: i64,
    now: u32,
    /// For how long nobody could use the table.
    seconds: f64,
}

pub(super) async fn migrate(args: MigrateArgs, output: Output) -> ExitCode {
    let url = match args.database.check() {
        Ok(url) => url,
        Err(errors) => return fail_usage(&errors),
    };
    match run(&Store::new(&url, 1), args.partitions).await {
        Ok(migrated) => {
            output.answer(&migrated);
            ExitCode::SUCCESS
        }
        Err(error @ (SchemaError::Store(_) | SchemaError::Migrate { .. })) => fail(1, &error.into()),
        Err(error) => fail(SCHEMA, &error.into()),
    }
}

async fn run(store: &Store, partitions: Option<u32>) -> Result<Migrated, SchemaError> {
    let ran = store.migrate().await?;
    let partitions = match partitions {
        Some(partitions) => Some(store.partition(partitions).await?.into()),
        None => None,
    };
    Ok(Migrated { database: store.place(), ran, partitions })
}

impl From<Partitioned> for Partitions {
    fn from(Partitioned { before, now, took }: Partitioned) -> Self {
        Self { before, now, seconds: took.as_secs_f64() }
    }
}

impl fmt::Display for Migrated {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ran {
            0 => write!(formatter, "{} is up to date", self.database)?,
            ran => write!(formatter, "ran {ran} migrations on {}", self.database)?,
        }
        match &self.partitions {
            None => Ok(()),
            Some(Partitions { before, now, .. }) if *before == i64::from(*now) => {
                write!(formatter, "; tidings.schedules was {} already", describe(*before))
            }
            Some(Partitions { before, now, seconds }) => write!(
                formatter,
                "; tidings.schedules was {} and is {}; it was locked for {:?}",
                describe(*before),
                describe(i64::from(*now)),
                Duration::from_millis(Duration::from_secs_f64(*seconds).as_millis().try_into().unwrap_or(u64::MAX))
            ),
        }
    }
}

fn describe(partitions: i64) -> String {
    if partitions == 1 { "a plain table".to_owned() } else { format!("a table of {partitions} partitions") }
}
