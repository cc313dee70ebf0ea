-- Limits: how many rows of a kind, or of each subject of a kind, may go in a time. A due row of a limited kind is moved out of the
-- queue into a line, once, and leaves it when its turn comes (host/docs/limits.md). What a limit has allowed so far is kept here, and
-- changed in the transaction that delivers, so all daemons together keep to it.
CREATE TABLE tidings.limits (
    kind text PRIMARY KEY
        CONSTRAINT "kind must match [a-z0-9][a-z0-9._-]{0,99}"
        CHECK (kind ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    count integer NOT NULL
        CONSTRAINT "count must be from 1 to 1000000"
        CHECK (count BETWEEN 1 AND 1000000),
    per interval NOT NULL
        CONSTRAINT "per must be from 1 millisecond to 1 year"
        CHECK (per >= '1 millisecond' AND per <= '1 year'),
    burst integer NOT NULL
        CONSTRAINT "burst must be from 1 to 1000000"
        CHECK (burst BETWEEN 1 AND 1000000),
    by text NOT NULL
        CONSTRAINT "by must be kind or subject"
        CHECK (by IN ('kind', 'subject')),
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    role text NOT NULL DEFAULT session_user,
    -- Derived, so that all statements reckon alike.
    step double precision GENERATED ALWAYS AS (date_part('epoch', per) / nullif(count, 0)) STORED
);
COMMENT ON TABLE tidings.limits IS 'How many rows of a kind may go in a time; written by tidings.limit and tidings.unlimit.';
COMMENT ON COLUMN tidings.limits.kind IS 'The kind.';
COMMENT ON COLUMN tidings.limits.count IS 'At most this many rows in each per, evenly.';
COMMENT ON COLUMN tidings.limits.per IS 'The time for count rows.';
COMMENT ON COLUMN tidings.limits.burst IS 'This many rows may go at once after a pause.';
COMMENT ON COLUMN tidings.limits.by IS 'kind: the limit is for all rows of the kind together; subject: for each subject by itself.';
COMMENT ON COLUMN tidings.limits.since IS 'When the limit was set or changed.';
COMMENT ON COLUMN tidings.limits.role IS 'The login role that set it.';
COMMENT ON COLUMN tidings.limits.step IS 'The time from one turn to the next, in seconds.';

-- A line has the due rows of a limited kind, or of one of its subjects, that wait for their turn. It stays after its last row until
-- its next turn has passed, because it knows when that is.
CREATE TABLE tidings.lines (
    kind text NOT NULL,
    subject text NOT NULL,
    free_at timestamptz NOT NULL DEFAULT '-infinity',
    waiting boolean NOT NULL DEFAULT true,
    generation bigint NOT NULL DEFAULT 1,
    PRIMARY KEY (kind, subject)
) WITH (
    -- Each delivery changes its lines, and nothing that an index has if free_at is not in one that is read.
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.1,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
-- To find the lines of a kind whose turn has come.
CREATE INDEX lines_free_at ON tidings.lines (kind, free_at) WHERE waiting;
COMMENT ON TABLE tidings.lines IS 'The lines in which rows of limited kinds wait for their turn; written by the daemon alone.';
COMMENT ON COLUMN tidings.lines.kind IS 'The kind of its rows.';
COMMENT ON COLUMN tidings.lines.subject IS 'The subject of its rows; empty for rows without a subject, and for all rows of a kind that is limited as a whole.';
COMMENT ON COLUMN tidings.lines.free_at IS 'When a next row may go even if none may go in a burst (the theoretical arrival time of the generic cell rate algorithm).';
COMMENT ON COLUMN tidings.lines.waiting IS 'Whether rows may be in it.';
COMMENT ON COLUMN tidings.lines.generation IS 'How many times rows were added. Who finds it empty may only say so if none were added since.';

-- Kinds whose limit was taken back or now counts by something else: their rows go back from lines that are no more into the queue.
CREATE TABLE tidings.lifted (
    kind text PRIMARY KEY
);
COMMENT ON TABLE tidings.lifted IS 'Kinds whose rows a daemon has yet to put back from lines that are no more; written by tidings.limit and tidings.unlimit.';

-- Where a row waits. The new columns are empty or have a constant default, so no row is written; the lock keeps everybody from the
-- tables for a moment. It is not waited for while others stand behind us for longer than half a second. The index has the rows that
-- are out of the queue: those in lines, in the order in which they go (the one that was due earliest first, each step of priority
-- counting like a minute), and those that are held. It is made by reading the table once.
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            ALTER TABLE tidings.schedules
                ADD COLUMN line text,
                ADD COLUMN priority smallint NOT NULL DEFAULT 4
                    CONSTRAINT "priority must be from 0 to 9" CHECK (priority BETWEEN 0 AND 9);
            ALTER TABLE tidings.parked ADD COLUMN priority smallint NOT NULL DEFAULT 4;
            CREATE INDEX schedules_line ON tidings.schedules (kind, line, (due_at AT TIME ZONE 'UTC' - priority * interval '1 minute')) WHERE held;
            -- The new index begins with the same column. While a million rows are moved into their line, the planner, whose statistics
            -- lag behind, took the old one to see whether other rows of the kind are held, and read all of them.
            DROP INDEX tidings.schedules_held;
            -- A row that gets another subject belongs into another line.
            CREATE OR REPLACE TRIGGER look_afresh_before_update
                BEFORE UPDATE OF id, kind, subject, due_at, expires_at, payload, headers ON tidings.schedules
                FOR EACH ROW EXECUTE FUNCTION tidings.look_afresh();
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                tries := tries + 1;
                IF tries = 60 THEN
                    RAISE EXCEPTION 'tidings.schedules is in use by long transactions: end them, or migrate again when they have ended'
                        USING ERRCODE = 'lock_not_available';
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
END
$$;

COMMENT ON COLUMN tidings.schedules.line IS 'The subject of its line in tidings.lines, while the row waits for its turn; null for all other rows.';
COMMENT ON COLUMN tidings.schedules.not_before IS 'When the row was written, the end of its backoff, or when it was moved into its line.';
COMMENT ON COLUMN tidings.schedules.priority IS 'Which of the rows that are due goes first: from 0, the last, to 9. Each minute of waiting counts like one step.';
COMMENT ON COLUMN tidings.parked.priority IS 'As in tidings.schedules.';

CREATE OR REPLACE FUNCTION tidings.look_afresh() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.due_at IS DISTINCT FROM OLD.due_at AND NEW.id = OLD.id THEN
        NEW.id := tidings.uuid_v7();
    END IF;
    IF NEW.id IS DISTINCT FROM OLD.id THEN
        NEW.attempts := 0;
        NEW.failures := 0;
        NEW.last_error := NULL;
    END IF;
    NEW.refusals := 0;
    NEW.held := false;
    NEW.line := NULL;
    NEW.not_before := tidings.arrival();
    RETURN NEW;
END
$$;

-- In the functions below, the parameter is named like the column, as everywhere.
CREATE FUNCTION tidings.limit(
    kind text,
    count integer,
    per interval DEFAULT '1 second',
    burst integer DEFAULT 1,
    by text DEFAULT 'kind'
) RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    was_by text;
    was_step double precision;
BEGIN
    SELECT present.by, present.step INTO was_by, was_step
    FROM tidings.limits AS present
    WHERE present.kind = "limit".kind
    FOR UPDATE;
    INSERT INTO tidings.limits (kind, count, per, burst, by)
    VALUES ("limit".kind, "limit".count, "limit".per, "limit".burst, "limit".by)
    ON CONFLICT (kind) DO UPDATE
    SET count = excluded.count,
        per = excluded.per,
        burst = excluded.burst,
        by = excluded.by,
        since = excluded.since,
        role = excluded.role;
    IF was_by <> "limit".by THEN
        INSERT INTO tidings.lifted (kind) VALUES ("limit".kind) ON CONFLICT DO NOTHING;
    END IF;
    -- The rows that went count, as many as they were, in the steps of the new limit.
    WITH locked AS MATERIALIZED (
        SELECT present.subject
        FROM tidings.lines AS present
        WHERE present.kind = "limit".kind
        ORDER BY present.subject COLLATE "C"
        FOR UPDATE
    )
    UPDATE tidings.lines AS changed
    SET free_at = statement_timestamp()
        + least(date_part('epoch', changed.free_at - statement_timestamp()) / was_step, limits.burst) * limits.step * interval '1 second'
    FROM locked, tidings.limits
    WHERE changed.kind = "limit".kind
        AND changed.subject = locked.subject
        AND changed.free_at > statement_timestamp()
        AND limits.kind = "limit".kind;
    -- The daemons read it when they look at the queue.
    IF current_setting('tidings.notify', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('tidings', '');
    END IF;
END
$$;

-- Returns whether there was a limit.
CREATE FUNCTION tidings.unlimit(kind text) RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM tidings.limits AS present WHERE present.kind = unlimit.kind;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tidings.lifted (kind) VALUES (unlimit.kind) ON CONFLICT DO NOTHING;
    IF current_setting('tidings.notify', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('tidings', '');
    END IF;
    RETURN true;
END
$$;

REVOKE ALL ON FUNCTION tidings.limit(text, integer, interval, integer, text), tidings.unlimit(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tidings.limit(text, integer, interval, integer, text), tidings.unlimit(text) TO tidings_producer, tidings_daemon;
GRANT SELECT ON tidings.limits, tidings.lines TO tidings_producer;
GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.limits, tidings.lines, tidings.lifted TO tidings_daemon;
