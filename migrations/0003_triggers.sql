-- Statement-level, so that a million rows cost one decision, and silent unless a row is due soon: every NOTIFY takes
-- a lock of the whole server until its commit is on disk. The daemon looks at least every 5 seconds by itself, so
-- what is due later than that needs no wake; 30 seconds leave 25 for a transaction that is slow to commit.
-- The decision uses clock_timestamp(): now() would be the start of a transaction that may be long.
-- The payload is empty, so that the notifications of one transaction collapse into one.
CREATE FUNCTION tidings.notify_if_due_soon() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    horizon CONSTANT timestamptz := clock_timestamp() + interval '30 seconds';
BEGIN
    IF EXISTS (SELECT FROM written WHERE slot_at <= horizon) THEN
        PERFORM pg_notify('tidings', '');
    END IF;
    RETURN NULL;
END
$$;

-- SET tidings.notify = off is for the daemon's own statements, and for transactions that must be PREPAREd, which
-- PostgreSQL refuses after a NOTIFY: their rows are found by the next sweep.
CREATE TRIGGER notify_after_insert
    AFTER INSERT ON tidings.schedules
    REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT
    WHEN (current_setting('tidings.notify', true) IS DISTINCT FROM 'off')
    EXECUTE FUNCTION tidings.notify_if_due_soon();
CREATE TRIGGER notify_after_update
    AFTER UPDATE ON tidings.schedules
    REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT
    WHEN (current_setting('tidings.notify', true) IS DISTINCT FROM 'off')
    EXECUTE FUNCTION tidings.notify_if_due_soon();

-- A producer's edit makes the daemon look at the row afresh, whatever it waited for; a new due time makes it a new
-- schedule, with a new id. The daemon's own updates touch none of these columns.
CREATE FUNCTION tidings.look_afresh() RETURNS trigger
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
    NEW.not_before := tidings.arrival();
    RETURN NEW;
END
$$;

CREATE TRIGGER look_afresh_before_update
    BEFORE UPDATE OF id, kind, due_at, expires_at, payload, headers ON tidings.schedules
    FOR EACH ROW EXECUTE FUNCTION tidings.look_afresh();
