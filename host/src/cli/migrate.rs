//! `tidings migrate`: creates or updates the schema.

use std::process::ExitCode;

use super::{SCHEMA, fail};
use crate::secret_url::SecretUrl;
use crate::store::{SchemaError, Store};

pub(super) async fn migrate(url: &SecretUrl) -> ExitCode {
    let store = Store::new(url, 1);
    match store.migrate().await {
        Ok(0) => {
            println!("{} is up to date", store.place());
            ExitCode::SUCCESS
        }
        Ok(ran) => {
            println!("ran {ran} migrations on {}", store.place());
            ExitCode::SUCCESS
        }
        Err(error @ (SchemaError::Store(_) | SchemaError::Migrate { .. })) => fail(1, &error.into()),
        Err(error) => fail(SCHEMA, &error.into()),
    }
}
