//! Recurrences as one more producer. A trigger writes each occurrence to the ledger in the transaction that makes it, so that
//! its message is judged as that of any row. Here its instant is judged as well: each must have been made once.

use sqlx::postgres::PgPool;
use sqlx::{AssertSqlSafe, Executor as _};

/// How many recurrences there are.
const RECURRENCES: u64 = 50;

/// Part of the ledger: which instants were made.
const TABLES: &str = "
    CREATE TABLE rig.occurrences (recurrence text NOT NULL, nominal_at timestamptz NOT NULL);
    CREATE TABLE rig.expected (recurrence text NOT NULL, nominal_at timestamptz NOT NULL);
    CREATE FUNCTION rig.note_occurrence() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO rig.occurrences VALUES (NEW.recurrence, NEW.nominal_at);
            INSERT INTO rig.scheduled VALUES (NEW.id, NEW.due_at, NEW.expires_at);
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER note_occurrence AFTER INSERT ON tidings.schedules
        FOR EACH ROW WHEN (NEW.recurrence IS NOT NULL) EXECUTE FUNCTION rig.note_occurrence()";

/// What became of the instants.
#[derive(Debug, Default)]
pub(crate) struct Instants {
    /// How many there were.
    pub(crate) expected: i64,
    /// Instants without an occurrence, as name and time.
    pub(crate) missing: Vec<String>,
    /// Instants with several occurrences, or that no rule says.
    pub(crate) wrong: Vec<String>,
}

impl Instants {
    pub(crate) fn are_right(&self) -> bool {
        self.missing.is_empty() && self.wrong.is_empty()
    }
}

/// Makes recurrences that come for so many seconds, each second or every five, some with a spread or a deadline.
pub(crate) async fn start(db: &PgPool, seconds: u64) -> anyhow::Result<()> {
    db.execute(TABLES).await?;
    let repeat = format!(
        r#"SELECT tidings.repeat(
                'r' || number, 'message', (ARRAY['every 1 second', '* * * * * *', 'every 5 seconds', '*/5 * * * * *'])[number % 4 + 1],
                payload => '{{"routing_key": "rig", "body": "rig"}}', catch_up => 'all',
                spread => CASE number % 3 WHEN 0 THEN interval '4 s' ELSE '0' END,
                starts_at => starts_at, ends_at => starts_at + interval '{seconds} s'
            )
            FROM (SELECT date_trunc('second', now()) + interval '3 s' AS starts_at) AS start,
                generate_series(1, {RECURRENCES}) AS number"#
    );
    db.execute(AssertSqlSafe(repeat)).await?;
    db.execute(
        "INSERT INTO rig.expected
         SELECT name, at
         FROM tidings.recurrences, generate_series(starts_at, ends_at, '1 second') AS at
         WHERE CASE rule
             WHEN 'every 5 seconds' THEN extract(epoch FROM at - starts_at)::int % 5 = 0
             WHEN '*/5 * * * * *' THEN extract(second FROM at)::int % 5 = 0
             ELSE true
         END",
    )
    .await?;
    Ok(())
}

/// Compares the instants that were made with those that the rules say.
pub(crate) async fn judge(db: &PgPool) -> anyhow::Result<Instants> {
    let names = |condition: &str| {
        format!(
            "SELECT recurrence || ' at ' || nominal_at
             FROM (SELECT recurrence, nominal_at, count(*) AS made FROM rig.occurrences GROUP BY 1, 2) AS made
             FULL JOIN (SELECT recurrence, nominal_at, true AS said FROM rig.expected) AS said USING (recurrence, nominal_at)
             WHERE {condition}
             ORDER BY nominal_at
             LIMIT 1000"
        )
    };
    let read = async |condition| sqlx::query_scalar(AssertSqlSafe(names(condition))).fetch_all(db).await;
    Ok(Instants {
        expected: sqlx::query_scalar("SELECT count(*) FROM rig.expected").fetch_one(db).await?,
        missing: read("made IS NULL").await?,
        wrong: read("made > 1 OR said IS NULL").await?,
    })
}
