-- tidings.schedule gets another parameter. There cannot be two functions of that name, since calls would fit both. Who may call
-- the old one may call the new one; what was built upon the old one keeps it, under another name.
DO $$
DECLARE
    before_change CONSTANT regprocedure := 'tidings.schedule(text,timestamptz,jsonb,text,text,timestamptz,jsonb,text)';
BEGIN
    -- Kept for the end of this migration.
    PERFORM set_config(
        'tidings.grants',
        coalesce(
            (
                SELECT string_agg(
                    format(
                        'GRANT EXECUTE ON FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval) TO %s%s',
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
        DROP FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text);
    EXCEPTION
        WHEN dependent_objects_still_exist THEN
            ALTER FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text)
                RENAME TO schedule_without_spread;
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
    spread interval DEFAULT '0'
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
        INSERT INTO tidings.schedules AS pending (kind, key, subject, due_at, expires_at, payload, headers)
        VALUES (schedule.kind, schedule.key, schedule.subject, due, schedule.expires_at, schedule.payload, schedule.headers)
        ON CONFLICT (kind, key) WHERE key IS NOT NULL DO UPDATE
        SET id = excluded.id,
            subject = excluded.subject,
            due_at = excluded.due_at,
            expires_at = excluded.expires_at,
            payload = excluded.payload,
            headers = excluded.headers,
            created_at = excluded.created_at
        RETURNING pending.id INTO answer;
        RETURN answer;
    END IF;

    LOOP
        INSERT INTO tidings.schedules (kind, key, subject, due_at, expires_at, payload, headers)
        VALUES (schedule.kind, schedule.key, schedule.subject, due, schedule.expires_at, schedule.payload, schedule.headers)
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

REVOKE ALL ON FUNCTION tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text, interval) FROM PUBLIC;
DO $$
BEGIN
    IF current_setting('tidings.grants') <> '' THEN
        EXECUTE current_setting('tidings.grants');
    END IF;
    -- Its body names its parameters by its old name.
    IF to_regprocedure('tidings.schedule_without_spread(text,timestamptz,jsonb,text,text,timestamptz,jsonb,text)') IS NOT NULL THEN
        EXECUTE $function$
            CREATE OR REPLACE FUNCTION tidings.schedule_without_spread(
                kind text,
                due_at timestamptz,
                payload jsonb DEFAULT '{}',
                key text DEFAULT NULL,
                subject text DEFAULT NULL,
                expires_at timestamptz DEFAULT NULL,
                headers jsonb DEFAULT '{}',
                on_conflict text DEFAULT 'replace'
            ) RETURNS uuid
                LANGUAGE plpgsql
                SECURITY DEFINER
                SET search_path = pg_catalog, pg_temp
                AS 'BEGIN RETURN tidings.schedule($1, $2, $3, $4, $5, $6, $7, $8); END'
        $function$;
    END IF;
END
$$;

-- An occurrence that is put back is one still. A row that is put back was not missed, however late it is (tidings.catch_up).
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
        id, kind, key, subject, due_at, expires_at, payload, headers, created_at, last_error, recurrence, nominal_at
    )
    VALUES (
        back.id, back.kind, back.key, back.subject, back.due_at, back.expires_at, back.payload, back.headers, back.created_at,
        'it was parked, and was put back', back.recurrence, back.nominal_at
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
