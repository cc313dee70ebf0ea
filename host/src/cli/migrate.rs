//! `tidings migrate`: creates or updates the schema.

use std::fmt;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::{SCHEMA, fail};
use crate::model::secrets::SecretUrl;
use crate::store::{SchemaError, Store};

/// What `tidings migrate` answers.
#[derive(Debug, Serialize)]
struct Migrated {
    /// Host, port and name of the database.
    database: String,
    /// How many migrations ran.
    ran: usize,
}

pub(super) async fn migrate(url: &SecretUrl, output: Output) -> ExitCode {
    let store = Store::new(url, 1);
    match store.migrate().await {
        Ok(ran) => {
            output.answer(&Migrated { database: store.place(), ran });
            ExitCode::SUCCESS
        }
        Err(error @ (SchemaError::Store(_) | SchemaError::Migrate { .. })) => fail(1, &error.into()),
        Err(error) => fail(SCHEMA, &error.into()),
    }
}

impl fmt::Display for Migrated {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ran {
            0 => write!(formatter, "{} is up to date", self.database),
            ran => write!(formatter, "ran {ran} migrations on {}", self.database),
        }
    }
}
