-- Many who notify hold each other up: a NOTIFY takes a lock of the whole server until its commit is on disk, so that such
-- transactions commit one after the other. When many notifications come, the daemon therefore promises to look by itself,
-- every few milliseconds, until a time that it writes here, and the triggers are silent until then. Whoever was silent has a
-- transaction number from before that time; the daemon goes on looking until all of those have ended.
-- A sequence, because what is written to it is there for everybody at once, whatever snapshot and transaction they have.
CREATE SEQUENCE tidings.polling_until MINVALUE 0 START 0;
COMMENT ON SEQUENCE tidings.polling_until IS 'Until when the daemon looks at the queue without being notified, in microseconds since 1970.';
-- The triggers run with the rights of whoever writes the row.
GRANT SELECT ON SEQUENCE tidings.polling_until TO PUBLIC;
GRANT UPDATE ON SEQUENCE tidings.polling_until TO tidings_daemon;

CREATE OR REPLACE FUNCTION tidings.notify_if_due_soon() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    horizon CONSTANT timestamptz := clock_timestamp() + interval '30 seconds';
BEGIN
    IF EXISTS (SELECT FROM written WHERE slot_at <= horizon)
        -- A promise is for a second: one that is longer is from before the clock was set back.
        AND NOT EXISTS (
            SELECT FROM tidings.polling_until
            WHERE to_timestamp(last_value / 1e6::float8) - clock_timestamp() BETWEEN '0' AND '2 seconds'
        )
    THEN
        PERFORM pg_notify('tidings', '');
    END IF;
    RETURN NULL;
END
$$;
