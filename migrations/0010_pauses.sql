-- Kinds that a person stopped. A pause ends by itself at `until`; whoever asks goes by the view, so that nobody must take
-- away what has ended for that.
CREATE TABLE tidings.pauses (
    kind text PRIMARY KEY
        CONSTRAINT "kind must match [a-z0-9][a-z0-9._-]{0,99}"
        CHECK (kind ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    until timestamptz
        CONSTRAINT "until must be before the year 10000"
        CHECK (until < '10000-01-01 00:00:00+00'),
    reason text
        CONSTRAINT "reason must be at most 4096 bytes"
        CHECK (octet_length(reason) <= 4096),
    by text NOT NULL DEFAULT session_user,
    CONSTRAINT "until must be in the future" CHECK (until > since)
);

COMMENT ON TABLE tidings.pauses IS 'Kinds whose rows are not delivered, since a person said so; written by `tidings pause` and `tidings resume`.';
COMMENT ON COLUMN tidings.pauses.since IS 'When the pause began.';
COMMENT ON COLUMN tidings.pauses.until IS 'When it ends by itself; null means only when somebody resumes the kind.';
COMMENT ON COLUMN tidings.pauses.reason IS 'Why, for people.';
COMMENT ON COLUMN tidings.pauses.by IS 'The login role of whoever paused it.';

CREATE VIEW tidings.paused AS
    SELECT kind, since, until, reason, by
    FROM tidings.pauses
    WHERE until IS NULL OR until > statement_timestamp();

COMMENT ON VIEW tidings.paused IS 'The pauses that have not ended.';

GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.pauses TO tidings_daemon;
GRANT SELECT ON tidings.pauses TO tidings_producer;
GRANT SELECT ON tidings.paused TO tidings_producer, tidings_daemon;
