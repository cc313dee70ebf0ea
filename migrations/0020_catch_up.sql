-- Kinds whose rows are worth nothing when they are late. A row that has been due for longer than `within` when a daemon first
-- claims it, because none ran or its kind was paused, is finished as expired.
CREATE TABLE tidings.catch_ups (
    kind text PRIMARY KEY
        CONSTRAINT "kind must match [a-z0-9][a-z0-9._-]{0,99}"
        CHECK (kind ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    within interval NOT NULL
        CONSTRAINT "within must be from 1 second to 1000 years"
        CHECK (within >= '1 second' AND within <= '1000 years')
);
COMMENT ON TABLE tidings.catch_ups IS 'Kinds whose rows are not delivered when they were missed; written by tidings.catch_up.';
COMMENT ON COLUMN tidings.catch_ups.kind IS 'The kind.';
COMMENT ON COLUMN tidings.catch_ups.within IS 'How long a row of the kind may have been due when it is claimed.';

CREATE FUNCTION tidings.catch_up(kind text, what text, within interval DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF catch_up.what IS NULL OR catch_up.what NOT IN ('all', 'none') THEN
        RAISE EXCEPTION 'what must be all or none, not %', coalesce(quote_literal(catch_up.what), 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'what';
    END IF;
    IF catch_up.what = 'all' AND catch_up.within IS NULL THEN
        DELETE FROM tidings.catch_ups AS present WHERE present.kind = catch_up.kind;
    ELSE
        INSERT INTO tidings.catch_ups (kind, within)
        -- A daemon that restarts, or is replaced by another, is back within half a minute.
        VALUES (catch_up.kind, coalesce(catch_up.within, '30 seconds'))
        ON CONFLICT (kind) DO UPDATE SET within = excluded.within;
    END IF;
    -- The daemons read it when they look at the queue.
    IF current_setting('tidings.notify', true) IS DISTINCT FROM 'off' THEN
        PERFORM pg_notify('tidings', '');
    END IF;
END
$$;

REVOKE ALL ON FUNCTION tidings.catch_up(text, text, interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tidings.catch_up(text, text, interval) TO tidings_producer, tidings_daemon;
GRANT SELECT ON tidings.catch_ups TO tidings_producer;
GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.catch_ups TO tidings_daemon;
