-- Priority: which of the rows that are due goes first, and the property of the message. Also the index by which kinds take turns in a
-- backlog.

-- The lock is not waited for while others stand behind us for longer than half a second. The index is made by reading the table
-- once, and nobody can write meanwhile: some 5 s for a million rows.
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            -- By time without a zone, which no other index has, so the planner takes no other one.
            CREATE INDEX schedules_turn ON tidings.schedules (kind, priority, (slot_at AT TIME ZONE 'UTC')) WHERE NOT held;
            ALTER TABLE tidings.recurrences
                ADD COLUMN priority smallint NOT NULL DEFAULT 4
                    CONSTRAINT "priority must be from 0 to 9" CHECK (priority BETWEEN 0 AND 9);
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                tries := tries + 1;
                IF tries = 60 THEN
                    RAISE EXCEPTION 'tidings.schedules or tidings.recurrences is in use by long transactions: end them, or migrate again when they have ended'
                        USING ERRCODE = 'lock_not_available';
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
END
$$;
GRANT INSERT (priority), UPDATE (priority) ON tidings.schedules TO tidings_producer;
COMMENT ON COLUMN tidings.recurrences.priority IS 'The priority of each occurrence.';

-- tidings.schedule and tidings.repeat get another parameter. There cannot be two functions of one name, since calls would fit both.
-- Who may call the old one may call the new one; what was built upon the old one keeps it, under another name.
DO $$
DECLARE
    before record;
    grants text := '';
BEGIN
    FOR before IN
        SELECT
            proname AS name, proacl AS access, proowner AS owner, oid::regprocedure AS signature,
            format('tidings.%I(%s, integer)', proname, pg_get_function_identity_arguments(oid)) AS signature_now
        FROM pg_proc
        WHERE oid IN (
            'tidings.schedule(text,timestamptz,jsonb,text,text,timestamptz,jsonb,text,interval)'::regprocedure,
            'tidings.repeat(text,text,text,text,jsonb,text,jsonb,interval,text,interval,interval,timestamptz,timestamptz,bigint,text)'::regprocedure
        )
    LOOP
        grants := grants || coalesce(
            (
                SELECT string_agg(
                    format(
                        'GRANT EXECUTE ON FUNCTION %s TO %s%s;',
                        before.signature_now,
                        CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                        CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
                    ),
                    ''
                )
                FROM aclexplode(before.access)
                WHERE grantee <> before.owner
            ),
            ''
        );
        BEGIN
            EXECUTE format('DROP FUNCTION %s', before.signature);
        EXCEPTION
            WHEN dependent_objects_still_exist THEN
                EXECUTE format('ALTER FUNCTION %s RENAME TO %I', before.signature, before.name || '_without_priority');
        END;
    END LOOP;
    -- Kept for the end of this migration.
    PERFORM set_config('tidings.grants', grants, true);
END
$$;

CREATE FUNCTION tidings.schedule(
    kind text,
    due_at timestamptz,
    payload jsonb DEFAULT '{}',
    key text DEFAULT NULL,
    subject text DEFAULT NULL,
    expires_at timestamptz DEFAULT NULL,
    headers jsonb DEFAULT '{}',
    on_conflict text DEFAULT 'replace',
    spread interval DEFAULT '0',
    priority integer DEFAULT 4
) RETURNS uuid
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    due timestamptz := schedule.due_at;
    answer uuid;
BEGIN
    IF schedule.on_conflict IS NULL OR schedule.on_conflict NOT IN ('replace', 'keep', 'error') THEN
        RAISE EXCEPTION 'on_conflict must be replace, keep or error, not %', coalesce(quote_literal(schedule.on_conflict), 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'on_conflict';
    END IF;
    IF schedule.priority IS NULL OR schedule.priority NOT BETWEEN 0 AND 9 THEN
        RAISE EXCEPTION 'priority must be from 0 to 9, not %', coalesce(schedule.priority::text, 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'priority';
    END IF;
    IF schedule.spread IS DISTINCT FROM '0' THEN
        IF schedule.spread IS NULL OR schedule.spread NOT BETWEEN '0' AND '10 years' THEN
            RAISE EXCEPTION 'spread must be from 0 to 10 years, not %', coalesce(schedule.spread::text, 'null')
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'spread';
        END IF;
        IF schedule.key IS NULL THEN
            RAISE EXCEPTION 'spread needs a key: by how much the row is due later follows from its key'
                USING ERRCODE = 'invalid_parameter_value', COLUMN = 'key';
        END IF;
        due := due + tidings.spread_offset(schedule.key, schedule.spread);
    END IF;

    IF schedule.on_conflict = 'replace' THEN
        INSERT INTO tidings.schedules AS pending (kind, key, subject, due_at, expires_at, payload, headers, priority)
        VALUES (schedule.kind, schedule.key, schedule.subject, due, schedule.expires_at, schedule.payload, schedule.headers, schedule.priority)
        ON CONFLICT (kind, key) WHERE key IS NOT NULL DO UPDATE
        SET id = excluded.id,
            subject = excluded.subject,
            due_at = excluded.due_at,
            expires_at = excluded.expires_at,
            payload = excluded.payload,
            headers = excluded.headers,
            priority = excluded.priority,
            created_at = excluded.created_at
        RETURNING pending.id INTO answer;
        RETURN answer;
    END IF;

    LOOP
        INSERT INTO tidings.schedules (kind, key, subject, due_at, expires_at, payload, headers, priority)
        VALUES (schedule.kind, schedule.key, schedule.subject, due, schedule.expires_at, schedule.payload, schedule.headers, schedule.priority)
        ON CONFLICT (kind, key) WHERE key IS NOT NULL DO NOTHING
        RETURNING id INTO answer;
        IF FOUND THEN
            RETURN answer;
        END IF;

        -- The lock waits for a claim in flight; a row that was delivered meanwhile is gone, and the insert is tried again.
        SELECT pending.id INTO answer
        FROM tidings.schedules AS pending
        WHERE pending.kind = schedule.kind AND pending.key = schedule.key
        FOR KEY SHARE;
        CONTINUE WHEN NOT FOUND;

        IF schedule.on_conflict = 'keep' THEN
            RETURN answer;
        END IF;
        RAISE EXCEPTION 'key "%" of kind "%" is already scheduled, with id %', schedule.key, schedule.kind, answer
            USING ERRCODE = 'unique_violation', SCHEMA = 'tidings', TABLE = 'schedules', COLUMN = 'key',
                  HINT = 'Use on_conflict => ''replace'' or ''keep'', or another key.';
    END LOOP;
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
    on_conflict text DEFAULT 'replace',
    priority integer DEFAULT 4
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
    IF repeat.priority IS NULL OR repeat.priority NOT BETWEEN 0 AND 9 THEN
        RAISE EXCEPTION 'priority must be from 0 to 9, not %', coalesce(repeat.priority::text, 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'priority';
    END IF;
    every := tidings.check_rule(repeat.rule);
    PERFORM tidings.check_time_zone(repeat.time_zone);

    LOOP
        -- The lock waits for a daemon that makes occurrences of it.
        SELECT present.* INTO old FROM tidings.recurrences AS present WHERE present.name = repeat.name FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO tidings.recurrences (
            name, kind, rule, time_zone, payload, subject, headers, expires_after, catch_up, catch_up_within, spread,
            starts_at, ends_at, max_count, priority, anchor, passed_at, next_at
        )
        VALUES (
            repeat.name, repeat.kind, repeat.rule, repeat.time_zone, repeat.payload, repeat.subject, repeat.headers,
            repeat.expires_after, repeat.catch_up, repeat.catch_up_within, repeat.spread, repeat.starts_at, repeat.ends_at,
            repeat.max_count, repeat.priority, anchor_now, called_at, tidings.next_of_every(anchor_now, every, after)
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
            old.catch_up_within, old.spread, old.starts_at, old.ends_at, old.max_count, old.priority
        ) IS NOT DISTINCT FROM ROW(
            repeat.kind, repeat.rule, repeat.time_zone, repeat.payload, repeat.subject, repeat.headers, repeat.expires_after,
            repeat.catch_up, repeat.catch_up_within, repeat.spread, repeat.starts_at, repeat.ends_at, repeat.max_count,
            repeat.priority
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
        priority = repeat.priority,
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

REVOKE ALL ON FUNCTION
    tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval, integer),
    tidings.repeat(
        text, text, text, text, jsonb, text, jsonb, interval, text, interval, interval, timestamptz, timestamptz, bigint, text, integer
    )
FROM PUBLIC;
DO $$
BEGIN
    IF current_setting('tidings.grants') <> '' THEN
        EXECUTE current_setting('tidings.grants');
    END IF;
    -- The bodies of the old ones name their parameters by their old names.
    IF EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'tidings'::regnamespace AND proname = 'schedule_without_priority') THEN
        EXECUTE $function$
            CREATE OR REPLACE FUNCTION tidings.schedule_without_priority(
                kind text,
                due_at timestamptz,
                payload jsonb DEFAULT '{}',
                key text DEFAULT NULL,
                subject text DEFAULT NULL,
                expires_at timestamptz DEFAULT NULL,
                headers jsonb DEFAULT '{}',
                on_conflict text DEFAULT 'replace',
                spread interval DEFAULT '0'
            ) RETURNS uuid
                LANGUAGE plpgsql
                SECURITY DEFINER
                SET search_path = pg_catalog, pg_temp
                AS 'BEGIN RETURN tidings.schedule($1, $2, $3, $4, $5, $6, $7, $8, $9); END'
        $function$;
    END IF;
    IF EXISTS (SELECT FROM pg_proc WHERE pronamespace = 'tidings'::regnamespace AND proname = 'repeat_without_priority') THEN
        EXECUTE $function$
            CREATE OR REPLACE FUNCTION tidings.repeat_without_priority(
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
                AS 'BEGIN RETURN tidings.repeat($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15); END'
        $function$;
    END IF;
END
$$;

-- A row that is put back keeps its priority.
CREATE OR REPLACE FUNCTION tidings.unpark(id uuid) RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    back tidings.parked;
BEGIN
    DELETE FROM tidings.parked AS aside WHERE aside.id = unpark.id RETURNING aside.* INTO back;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO tidings.schedules (
        id, kind, key, subject, due_at, expires_at, payload, headers, created_at, last_error, recurrence, nominal_at, priority
    )
    VALUES (
        back.id, back.kind, back.key, back.subject, back.due_at, back.expires_at, back.payload, back.headers, back.created_at,
        'it was parked, and was put back', back.recurrence, back.nominal_at, back.priority
    )
    ON CONFLICT (kind, key) WHERE key IS NOT NULL DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'key "%" of kind "%" has been scheduled again since % was parked', back.key, back.kind, back.id
            USING ERRCODE = 'unique_violation', SCHEMA = 'tidings', TABLE = 'schedules', COLUMN = 'key',
                  HINT = 'Cancel the newer schedule first, or delete the parked row.';
    END IF;
    RETURN true;
END
$$;
