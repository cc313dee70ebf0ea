-- The SQL interface. The functions run with their owner's rights, since they write columns (the id among them) that
-- a producer may not, and for that reason with a fixed search_path. They add nothing to the rules of the table: its
-- constraints speak for both ways in.

CREATE FUNCTION tidings.schedule(
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
AS $$
#variable_conflict use_column
DECLARE
    answer uuid;
BEGIN
    IF schedule.on_conflict IS NULL OR schedule.on_conflict NOT IN ('replace', 'keep', 'error') THEN
        RAISE EXCEPTION 'on_conflict must be replace, keep or error, not %', coalesce(quote_literal(schedule.on_conflict), 'null')
            USING ERRCODE = 'invalid_parameter_value', COLUMN = 'on_conflict';
    END IF;

    IF schedule.on_conflict = 'replace' THEN
        INSERT INTO tidings.schedules AS pending (kind, key, subject, due_at, expires_at, payload, headers)
        VALUES (schedule.kind, schedule.key, schedule.subject, schedule.due_at, schedule.expires_at,
                schedule.payload, schedule.headers)
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
        VALUES (schedule.kind, schedule.key, schedule.subject, schedule.due_at, schedule.expires_at,
                schedule.payload, schedule.headers)
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

CREATE FUNCTION tidings.reschedule(kind text, key text, due_at timestamptz) RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE tidings.schedules AS pending
    SET id = tidings.uuid_v7(), due_at = reschedule.due_at
    WHERE pending.kind = reschedule.kind AND pending.key = reschedule.key;
    RETURN FOUND;
END
$$;

CREATE FUNCTION tidings.cancel(kind text, key text) RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM tidings.schedules AS pending
    WHERE pending.kind = cancel.kind AND pending.key = cancel.key;
    RETURN FOUND;
END
$$;

CREATE FUNCTION tidings.cancel_subject(subject text) RETURNS bigint
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    cancelled bigint;
BEGIN
    DELETE FROM tidings.schedules AS pending WHERE pending.subject = cancel_subject.subject;
    GET DIAGNOSTICS cancelled = ROW_COUNT;
    RETURN cancelled;
END
$$;

-- Its due time is past, so the row is due now; its attempts start again.
CREATE FUNCTION tidings.unpark(id uuid) RETURNS boolean
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
    INSERT INTO tidings.schedules (id, kind, key, subject, due_at, expires_at, payload, headers, created_at)
    VALUES (back.id, back.kind, back.key, back.subject, back.due_at, back.expires_at, back.payload, back.headers, back.created_at)
    ON CONFLICT (kind, key) WHERE key IS NOT NULL DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'key "%" of kind "%" has been scheduled again since % was parked', back.key, back.kind, back.id
            USING ERRCODE = 'unique_violation', SCHEMA = 'tidings', TABLE = 'schedules', COLUMN = 'key',
                  HINT = 'Cancel the newer schedule first, or delete the parked row.';
    END IF;
    RETURN true;
END
$$;
