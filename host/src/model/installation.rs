//! Which database this is. An installation has an id, which a copy of its database shares with it; what tells them apart is the
//! server. No I/O.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A database on a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// PostgreSQL's system identifier, which a server shares with its standbys and with copies of its files; `None` = our role
    /// may not read it.
    pub system: Option<String>,
    /// The timeline, which grows when a standby is promoted or a backup is restored to a point in time; `None` as above.
    pub timeline: Option<i32>,
    /// The name of the database.
    pub database: String,
    /// Host and port at which the server was reached; `None` = by a socket in the file system.
    pub address: Option<String>,
}

/// What a daemon knows of its database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The id of the installation.
    pub installation: Uuid,
    /// From where its rows were last delivered: one server, by each address at which daemons reached it; empty = never.
    pub recorded: Vec<Server>,
    /// Where the database is.
    pub here: Server,
}

/// What a daemon tells the other daemons of its exchange, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The id of its installation.
    pub installation: Uuid,
    /// The daemon; a new id for each process.
    pub daemon: Uuid,
    /// Where its database is.
    pub server: Server,
    /// It delivers.
    pub delivers: bool,
    /// The others are to announce themselves at once.
    pub asks: bool,
}

impl Server {
    /// Whether both are the same server and database, perhaps by another address. Copies of a server's files are, too.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        self.system.is_some()
            && (&self.system, &self.timeline, &self.database) == (&other.system, &other.timeline, &other.database)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { system, timeline, database, address } = self;
        write!(formatter, "{database} at {}", address.as_deref().unwrap_or("a local socket"))?;
        if let (Some(system), Some(timeline)) = (system, timeline) {
            write!(formatter, " (system {system}, timeline {timeline})")?;
        }
        Ok(())
    }
}
