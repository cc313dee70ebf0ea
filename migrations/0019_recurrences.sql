-- Recurrences: rules that make rows. A daemon puts each occurrence into tidings.schedules shortly before it is due, in the
-- transaction that moves next_at on.
CREATE TABLE tidings.recurrences (
    name text PRIMARY KEY
        -- The key of an occurrence is the name and its instant, and a key has at most 255 bytes.
        CONSTRAINT "name must be 1 to 230 bytes"
        CHECK (octet_length(name) BETWEEN 1 AND 230),
    kind text NOT NULL
        CONSTRAINT "kind must match [a-z0-9][a-z0-9._-]{0,99}"
        CHECK (kind ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    rule text NOT NULL
        CONSTRAINT "rule must be 1 to 255 bytes"
        CHECK (octet_length(rule) BETWEEN 1 AND 255),
    time_zone text NOT NULL
        CONSTRAINT "time_zone must be 1 to 255 bytes"
        CHECK (octet_length(time_zone) BETWEEN 1 AND 255),
    payload jsonb NOT NULL
        CONSTRAINT "payload must be at most 16 MiB"
        CHECK (pg_column_size(payload) <= 16777216),
    subject text
        CONSTRAINT "subject must be 1 to 255 bytes"
        CHECK (octet_length(subject) BETWEEN 1 AND 255),
    headers jsonb NOT NULL
        CONSTRAINT "headers must be an object of strings, 16 KiB together"
        CHECK (headers = '{}' OR tidings.headers_are_strings(headers))
        CONSTRAINT "headers must not be named tidings-*, x-*, CC, BCC or ''"
        CHECK (headers = '{}' OR tidings.header_names_are_allowed(headers)),
    expires_after interval
        CONSTRAINT "expires_after must be from 1 ms to 1000 years"
        CHECK (expires_after >= '1 millisecond' AND expires_after <= '1000 years'),
    catch_up text NOT NULL
        CONSTRAINT "catch_up must be latest, all or none"
        CHECK (catch_up IN ('latest', 'all', 'none')),
    catch_up_within interval
        CONSTRAINT "catch_up_within must be from 1 ms to 1000 years"
        CHECK (catch_up_within >= '1 millisecond' AND catch_up_within <= '1000 years'),
    spread interval NOT NULL
        CONSTRAINT "spread must be from 0 to 10 years"
        CHECK (spread >= '0' AND spread <= '10 years'),
    starts_at timestamptz
        CONSTRAINT "starts_at must be between the years 1970 and 9999"
        CHECK (starts_at >= '1970-01-01 00:00:00+00' AND starts_at < '10000-01-01 00:00:00+00'),
    ends_at timestamptz
        CONSTRAINT "ends_at must be between the years 1970 and 9999"
        CHECK (ends_at >= '1970-01-01 00:00:00+00' AND ends_at < '10000-01-01 00:00:00+00'),
    max_count bigint
        CONSTRAINT "max_count must be 1 at least"
        CHECK (max_count >= 1),
    next_at timestamptz
        CONSTRAINT "next_at must be between the years 1970 and 9999"
        CHECK (next_at >= '1970-01-01 00:00:00+00' AND next_at < '10000-01-01 00:00:00+00'),
    last_at timestamptz,
    count bigint NOT NULL DEFAULT 0,
    problem text,
    paused boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),

    -- Internal.
    anchor timestamptz NOT NULL,
    passed_at timestamptz NOT NULL,
    ended boolean NOT NULL DEFAULT false,
    time_zone_version text,
    not_before timestamptz,
    make_at timestamptz,
    CONSTRAINT "ends_at must be after starts_at" CHECK (ends_at > starts_at)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- What the daemons read to know when to make the next occurrence.
CREATE INDEX recurrences_make_at ON tidings.recurrences (make_at);

-- For what counts problems.
CREATE INDEX recurrences_problem ON tidings.recurrences (name) WHERE problem IS NOT NULL;

COMMENT ON TABLE tidings.recurrences IS 'Rules that make rows of tidings.schedules; written by tidings.repeat and tidings.stop_repeating.';
COMMENT ON COLUMN tidings.recurrences.name IS 'Names the recurrence; its occurrences have the key name/instant.';
COMMENT ON COLUMN tidings.recurrences.kind IS 'The kind of the occurrences.';
COMMENT ON COLUMN tidings.recurrences.rule IS 'A cron rule, or for instance "every 90 minutes".';
COMMENT ON COLUMN tidings.recurrences.time_zone IS 'The zone in whose time a cron rule is read.';
COMMENT ON COLUMN tidings.recurrences.payload IS 'The payload of each occurrence.';
COMMENT ON COLUMN tidings.recurrences.subject IS 'The subject of each occurrence.';
COMMENT ON COLUMN tidings.recurrences.headers IS 'The headers of each occurrence.';
COMMENT ON COLUMN tidings.recurrences.expires_after IS 'How long after its due time an occurrence expires; null means never.';
COMMENT ON COLUMN tidings.recurrences.catch_up IS 'What is made of instants that were missed: the latest, all or none.';
COMMENT ON COLUMN tidings.recurrences.catch_up_within IS 'Instants that were missed for longer than this are not made.';
COMMENT ON COLUMN tidings.recurrences.spread IS 'Occurrences are due later than their instant by a part of this that follows from the name.';
COMMENT ON COLUMN tidings.recurrences.starts_at IS 'No instant is before this; "every" counts from here.';
COMMENT ON COLUMN tidings.recurrences.ends_at IS 'No instant is after this.';
COMMENT ON COLUMN tidings.recurrences.max_count IS 'So many occurrences are made, and no more.';
COMMENT ON COLUMN tidings.recurrences.next_at IS 'The next instant whose occurrence is not made yet; null while a daemon must compute it, and when there is none.';
COMMENT ON COLUMN tidings.recurrences.last_at IS 'The latest instant whose occurrence was made.';
COMMENT ON COLUMN tidings.recurrences.count IS 'How many occurrences were made.';
COMMENT ON COLUMN tidings.recurrences.problem IS 'Why no occurrence can be made.';
COMMENT ON COLUMN tidings.recurrences.paused IS 'A person stopped it: no occurrence is made.';
COMMENT ON COLUMN tidings.recurrences.created_at IS 'When it was made.';
COMMENT ON COLUMN tidings.recurrences.anchor IS 'The instant from which "every" counts.';
COMMENT ON COLUMN tidings.recurrences.passed_at IS 'Instants up to here are made, or will not be.';
COMMENT ON COLUMN tidings.recurrences.ended IS 'ends_at or max_count is reached.';
COMMENT ON COLUMN tidings.recurrences.time_zone_version IS 'The release of the time zone database by which next_at was computed.';
COMMENT ON COLUMN tidings.recurrences.not_before IS 'No daemon looks at it before; infinity means only when it has changed.';
COMMENT ON COLUMN tidings.recurrences.make_at IS 'When a daemon must look at it, to make occurrences or to compute next_at; null means never.';

-- Follows from the other columns, however they were written.
CREATE FUNCTION tidings.set_make_at() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.make_at := CASE
        WHEN NEW.paused OR NEW.ended THEN NULL
        -- Not in the past, so that the newest entries of the index are not among those of rows that have moved on.
        ELSE greatest(
            -- A daemon makes what is due within 30 s, and comes again 20 s before the next is due: for a rule of seconds it
            -- makes ten at a time.
            NEW.next_at + tidings.spread_offset(NEW.name, NEW.spread) - interval '20 seconds',
            NEW.not_before,
            clock_timestamp()
        )
    END;
    RETURN NEW;
END
$$;
CREATE TRIGGER set_make_at
    BEFORE INSERT OR UPDATE ON tidings.recurrences
    FOR EACH ROW EXECUTE FUNCTION tidings.set_make_at();

-- The daemons learn when to make the next occurrence from their looks at the queue, and look when they are notified.
CREATE FUNCTION tidings.notify_if_made_soon() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM written WHERE make_at <= clock_timestamp() + interval '30 seconds') THEN
        PERFORM pg_notify('tidings', '');
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER recurrences_notify_after_insert
    AFTER INSERT ON tidings.recurrences
    REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT
    WHEN (current_setting('tidings.notify', true) IS DISTINCT FROM 'off')
    EXECUTE FUNCTION tidings.notify_if_made_soon();
CREATE TRIGGER recurrences_notify_after_update
    AFTER UPDATE ON tidings.recurrences
    REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT
    WHEN (current_setting('tidings.notify', true) IS DISTINCT FROM 'off')
    EXECUTE FUNCTION tidings.notify_if_made_soon();

-- PostgreSQL reads some hundred files to list the time zones that it knows. A zone that a recurrence has already is not looked up.
CREATE FUNCTION tidings.check_time_zone(zone text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF zone = 'UTC'
        OR EXISTS (SELECT FROM tidings.recurrences WHERE time_zone = zone)
        OR EXISTS (SELECT FROM pg_timezone_names WHERE pg_timezone_names.name = zone)
    THEN
        RETURN;
    END IF;
    RAISE EXCEPTION 'time_zone % is unknown', coalesce(quote_literal(zone), 'null')
        USING ERRCODE = 'invalid_parameter_value', COLUMN = 'time_zone',
              HINT = 'Time zones have names such as Europe/Berlin; pg_timezone_names lists them.';
END
$$;

-- The first instant of "every so many seconds, counted from the anchor" that is after another.
CREATE FUNCTION tidings.next_of_every(anchor timestamptz, seconds bigint, after timestamptz) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN anchor + make_interval(secs => (
        seconds * (floor((extract(epoch FROM after)::numeric - extract(epoch FROM anchor)::numeric) / seconds) + 1)
    )::float8);

-- Takes back the occurrences that are not due yet, as if they had not been made.
CREATE FUNCTION tidings.withdraw_occurrences(recurrence text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    withdrawn bigint;
    earliest timestamptz;
BEGIN
    WITH gone AS (
        DELETE FROM tidings.schedules AS pending
        WHERE pending.recurrence = withdraw_occurrences.recurrence AND pending.due_at > clock_timestamp()
        RETURNING pending.nominal_at
    )
    SELECT count(*), min(nominal_at) INTO withdrawn, earliest FROM gone;
    IF withdrawn > 0 THEN
        UPDATE tidings.recurrences AS changed
        SET count = changed.count - withdrawn,
            next_at = earliest,
            passed_at = earliest - interval '1 microsecond',
            ended = false,
            last_at = (
                SELECT max(nominal_at) FROM tidings.schedules AS pending WHERE pending.recurrence = withdraw_occurrences.recurrence
            )
        WHERE changed.name = withdraw_occurrences.recurrence;
    END IF;
END
$$;

CREATE FUNCTION tidings.repeat(
    name text,
    kind text,
    rule text,
    time_zone text DEFAULT 'UTC',
    payload jsonb DEFAULT '{}',
    subject text DEFAULT NULL,
    headers jsonb DEFAULT '{}',
    expires_after interval DEFAULT NULL,
    catch_up text DEFAULT 'latest',
    catch_up_within interval DEFAULT NULL,
    spread interval DEFAULT '0',
    starts_at timestamptz DEFAULT NULL,
    ends_at timestamptz DEFAULT NULL,
    max_count bigint DEFAULT NULL,
    on_conflict text DEFAULT 'replace'
) RETURNS timestamptz
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    called_at CONSTANT timestamptz := clock_timestamp();
    -- Whole seconds, so that keys are short.
    anchor_now CONSTANT timestamptz := coalesce(repeat.starts_at, date_trunc('second', called_at));
    -- The start itself may be an instant.
    after CONSTANT timestamptz := greatest(called_at, repeat.starts_at - interval '1 microsecond');
    every bigint;
    old tidings.recurrences;
    is_new_rule boolean;
    answer timestamptz;
BEGIN
    IF repeat.on_conflict IS NULL OR repeat.on_conflict NOT IN ('replace', 'keep', 'error') THEN
        RAISE EXCEPTION 'on_conflict must be replace, keep or error, not %', coalesce(quote_literal(repeat.on_conflict), 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'on_conflict';
    END IF;
    every := tidings.check_rule(repeat.rule);
    PERFORM tidings.check_time_zone(repeat.time_zone);

    LOOP
        -- The lock waits for a daemon that makes occurrences of it.
        SELECT present.* INTO old FROM tidings.recurrences AS present WHERE present.name = repeat.name FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO tidings.recurrences (
            name, kind, rule, time_zone, payload, subject, headers, expires_after, catch_up, catch_up_within, spread,
            starts_at, ends_at, max_count, anchor, passed_at, next_at
        )
        VALUES (
            repeat.name, repeat.kind, repeat.rule, repeat.time_zone, repeat.payload, repeat.subject, repeat.headers,
            repeat.expires_after, repeat.catch_up, repeat.catch_up_within, repeat.spread, repeat.starts_at, repeat.ends_at,
            repeat.max_count, anchor_now, called_at, tidings.next_of_every(anchor_now, every, after)
        )
        ON CONFLICT (name) DO NOTHING
        RETURNING next_at INTO answer;
        IF FOUND THEN
            RETURN answer;
        END IF;
    END LOOP;

    IF repeat.on_conflict = 'error' THEN
        RAISE EXCEPTION 'recurrence "%" exists already', repeat.name
            USING ERRCODE = 'unique_violation', SCHEMA = 'tidings', TABLE = 'recurrences', COLUMN = 'name',
                  HINT = 'Use on_conflict => ''replace'' or ''keep'', or another name.';
    END IF;
    IF repeat.on_conflict = 'keep'
        OR ROW(
            old.kind, old.rule, old.time_zone, old.payload, old.subject, old.headers, old.expires_after, old.catch_up,
            old.catch_up_within, old.spread, old.starts_at, old.ends_at, old.max_count
        ) IS NOT DISTINCT FROM ROW(
            repeat.kind, repeat.rule, repeat.time_zone, repeat.payload, repeat.subject, repeat.headers, repeat.expires_after,
            repeat.catch_up, repeat.catch_up_within, repeat.spread, repeat.starts_at, repeat.ends_at, repeat.max_count
        )
    THEN
        RETURN old.next_at;
    END IF;

    -- What is made already was made as it was before. It is made again, unless its instant is no longer one.
    PERFORM tidings.withdraw_occurrences(repeat.name);
    is_new_rule := old.ended
        OR ROW(old.rule, old.time_zone, old.starts_at) IS DISTINCT FROM ROW(repeat.rule, repeat.time_zone, repeat.starts_at);
    UPDATE tidings.recurrences AS changed
    SET kind = repeat.kind,
        rule = repeat.rule,
        time_zone = repeat.time_zone,
        payload = repeat.payload,
        subject = repeat.subject,
        headers = repeat.headers,
        expires_after = repeat.expires_after,
        catch_up = repeat.catch_up,
        catch_up_within = repeat.catch_up_within,
        spread = repeat.spread,
        starts_at = repeat.starts_at,
        ends_at = repeat.ends_at,
        max_count = repeat.max_count,
        anchor = CASE
            WHEN ROW(old.rule, old.starts_at) IS DISTINCT FROM ROW(repeat.rule, repeat.starts_at) THEN anchor_now
            ELSE changed.anchor
        END,
        passed_at = CASE WHEN is_new_rule THEN called_at ELSE changed.passed_at END,
        next_at = CASE
            WHEN NOT is_new_rule THEN changed.next_at
            WHEN ROW(old.rule, old.starts_at) IS DISTINCT FROM ROW(repeat.rule, repeat.starts_at) THEN
                tidings.next_of_every(anchor_now, every, after)
            ELSE tidings.next_of_every(changed.anchor, every, after)
        END,
        ended = false,
        problem = NULL,
        not_before = NULL
    WHERE changed.name = repeat.name
    RETURNING changed.next_at INTO answer;
    RETURN answer;
END
$$;

CREATE FUNCTION tidings.stop_repeating(name text) RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM tidings.recurrences AS present WHERE present.name = stop_repeating.name;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- Waits for a claim in flight, as tidings.cancel does.
    DELETE FROM tidings.schedules AS pending WHERE pending.recurrence = stop_repeating.name;
    RETURN true;
END
$$;

-- Pauses a recurrence, or lets it go on. Returns whether that changed something; null = there is none of that name.
CREATE FUNCTION tidings.pause_recurrence(name text, paused boolean) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    was_paused boolean;
BEGIN
    SELECT present.paused INTO was_paused
    FROM tidings.recurrences AS present
    WHERE present.name = pause_recurrence.name
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF was_paused = pause_recurrence.paused THEN
        RETURN false;
    END IF;
    IF pause_recurrence.paused THEN
        PERFORM tidings.withdraw_occurrences(pause_recurrence.name);
    END IF;
    UPDATE tidings.recurrences AS changed
    SET paused = pause_recurrence.paused
    WHERE changed.name = pause_recurrence.name;
    RETURN true;
END
$$;

REVOKE ALL ON FUNCTION
    tidings.pause_recurrence(text, boolean),
    tidings.withdraw_occurrences(text),
    tidings.repeat(text, text, text, text, jsonb, text, jsonb, interval, text, interval, interval, timestamptz, timestamptz, bigint, text),
    tidings.stop_repeating(text)
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    tidings.repeat(text, text, text, text, jsonb, text, jsonb, interval, text, interval, interval, timestamptz, timestamptz, bigint, text),
    tidings.stop_repeating(text)
TO tidings_producer, tidings_daemon;
GRANT EXECUTE ON FUNCTION tidings.withdraw_occurrences(text), tidings.pause_recurrence(text, boolean) TO tidings_daemon;
GRANT SELECT ON tidings.recurrences TO tidings_producer;
GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.recurrences TO tidings_daemon;
