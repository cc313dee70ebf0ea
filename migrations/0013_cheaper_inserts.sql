-- PostgreSQL reads the expression of each constraint anew in every statement, and plans it. Those of the headers took as long
-- as everything else that an INSERT of one row does, even without headers. In functions of PL/pgSQL, which are called only
-- for rows with headers, they take next to nothing otherwise. The rules are the same.
CREATE FUNCTION tidings.headers_are_strings(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN jsonb_typeof(headers) = 'object'
        AND octet_length(headers::text) <= 16384
        AND NOT jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")', '{}', true);
END
$$;

CREATE OR REPLACE FUNCTION tidings.header_names_are_allowed(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce(
        (
            SELECT bool_and(
                octet_length(name) BETWEEN 1 AND 255
                AND NOT starts_with(name, 'tidings-')
                AND NOT starts_with(name, 'x-')
                AND name NOT IN ('CC', 'BCC')
            )
            FROM jsonb_object_keys(CASE WHEN jsonb_typeof(headers) = 'object' THEN headers ELSE '{}' END) AS name
        ),
        true
    );
END
$$;

-- PostgreSQL 18 makes such ids itself, in a fraction of the time. An older server that is upgraded to 18 keeps our own function.
DO $$
BEGIN
    IF to_regprocedure('pg_catalog.uuidv7()') IS NOT NULL THEN
        EXECUTE 'CREATE OR REPLACE FUNCTION tidings.uuid_v7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE RETURN uuidv7()';
    END IF;
END
$$;

-- Looks for a promise of the daemon first, without reading a table: while many rows are written, there is one.
CREATE OR REPLACE FUNCTION tidings.notify_if_due_soon() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    written_at CONSTANT timestamptz := clock_timestamp();
BEGIN
    -- A promise is for a second: one that is longer is from before the clock was set back.
    IF to_timestamp(pg_sequence_last_value('tidings.polling_until') / 1e6::float8) - written_at
        BETWEEN '0' AND '2 seconds'
    THEN
        RETURN NULL;
    END IF;
    IF EXISTS (SELECT FROM written WHERE slot_at <= written_at + interval '30 seconds') THEN
        PERFORM pg_notify('tidings', '');
    END IF;
    RETURN NULL;
END
$$;

-- The next migration checks the rows that are there. The lock keeps everybody from the table for a moment. It is not waited
-- for while others stand behind us for longer than half a second.
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            ALTER TABLE tidings.schedules
                DROP CONSTRAINT "headers must be an object of strings, 16 KiB together",
                ADD CONSTRAINT "headers must be an object of strings, 16 KiB together"
                    CHECK (headers = '{}' OR tidings.headers_are_strings(headers)) NOT VALID;
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
