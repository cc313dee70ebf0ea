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
GRANT INSERT (priority), UPDATE (priority) ON tidings.schedules TO tidings_producer;

-- tidings.schedule gets another parameter. There cannot be two functions of that name, since calls would fit both. Who may call
-- the old one may call the new one; what was built upon the old one keeps it, under another name.
DO $$
DECLARE
    before_change CONSTANT regprocedure := 'tidings.schedule(text,timestamptz,jsonb,text,text,timestamptz,jsonb,text,interval)';
BEGIN
    -- Kept for the end of this migration.
    PERFORM set_config(
        'tidings.grants',
        coalesce(
            (
                SELECT string_agg(
                    format(
                        'GRANT EXECUTE ON FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval, integer) TO %s%s',
                        CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                        CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
                    ),
                    ';'
                )
                FROM pg_proc, aclexplode(proacl)
                WHERE pg_proc.oid = before_change AND grantee <> proowner
            ),
            ''
        ),
        true
    );
    BEGIN
        DROP FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval);
    EXCEPTION
        WHEN dependent_objects_still_exist THEN
            ALTER FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval)
                RENAME TO schedule_without_priority;
    END;
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

REVOKE ALL ON FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval, integer) FROM PUBLIC;
DO $$
BEGIN
    IF current_setting('tidings.grants') <> '' THEN
        EXECUTE current_setting('tidings.grants');
    END IF;
    -- Its body names its parameters by its old name.
    IF to_regprocedure('tidings.schedule_without_priority(text,timestamptz,jsonb,text,text,timestamptz,jsonb,text,interval)') IS NOT NULL THEN
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
