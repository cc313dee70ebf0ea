-- Writes the rows of messages that were published to an intake. Returns the ids of those that were written.
WITH settings AS MATERIALIZED (
    SELECT
        set_config('tidings.notify', 'on', true),
        -- A row in delivery keeps its lock for 15 s at most.
        set_config('lock_timeout', '18s', true),
        clock_timestamp() AS now
), incoming AS MATERIALIZED (
    SELECT
        coalesce(id, tidings.uuid_v7()) AS id, kind, key, subject, payload::jsonb, headers::jsonb, expires_at, priority,
        -- One whose deadline has passed is finished as expired at once.
        CASE WHEN expires_at <= now THEN least(asked.due_at, expires_at - interval '1 ms') ELSE asked.due_at END AS due_at
    FROM unnest(
        $1::uuid[], $2::bool[], $3::text[], $4::text[], $5::text[], $6::float8[], $7::float8[], $8::float8[], $9::float8[],
        $10::float8[], $11::text[], $12::text[], $15::smallint[]
    ) AS message (id, redelivered, kind, key, subject, at, delay, sent, expires, expires_after, payload, headers, priority)
    CROSS JOIN settings
    CROSS JOIN LATERAL (
        SELECT coalesce(
            to_timestamp(at),
            -- The smaller one that is not null.
            least(now - make_interval(secs => $13), to_timestamp(sent)) + make_interval(secs => delay)
        ) AS due_at
    ) AS asked
    CROSS JOIN LATERAL (
        SELECT least(to_timestamp(expires), asked.due_at + make_interval(secs => expires_after)) AS expires_at
    ) AS deadline
    -- Its row may be there, or may have been finished, if it was delivered before. As single values, which PostgreSQL looks up by
    -- their indexes; for EXISTS it would rather read the whole tables.
    WHERE NOT redelivered
        OR (SELECT id FROM tidings.schedules WHERE schedules.id = message.id) IS NULL
        AND (SELECT id FROM tidings.parked WHERE parked.id = message.id) IS NULL
        AND (SELECT id FROM tidings.deliveries WHERE deliveries.id = message.id LIMIT 1) IS NULL
), kept AS (
    INSERT INTO tidings.schedules (id, kind, key, subject, due_at, expires_at, payload, headers, priority)
    SELECT id, kind, key, subject, due_at, expires_at, payload, headers, priority FROM incoming WHERE NOT $14
    ON CONFLICT DO NOTHING
    RETURNING id
), replaced AS (
    INSERT INTO tidings.schedules (id, kind, key, subject, due_at, expires_at, payload, headers, priority)
    SELECT id, kind, key, subject, due_at, expires_at, payload, headers, priority FROM incoming WHERE $14
    ON CONFLICT (kind, key) WHERE key IS NOT NULL DO UPDATE
    SET id = excluded.id,
        subject = excluded.subject,
        due_at = excluded.due_at,
        expires_at = excluded.expires_at,
        payload = excluded.payload,
        headers = excluded.headers,
        priority = excluded.priority,
        created_at = excluded.created_at
    RETURNING id
)
SELECT id AS "id!" FROM kept UNION ALL SELECT id FROM replaced
