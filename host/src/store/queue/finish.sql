WITH settled AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::bigint[])
        AS settled (id, outcome, finished_at, plugin, detail, event_digest, built_ms)
), gone AS (
    DELETE FROM tidings.schedules WHERE id = ANY($1)
    RETURNING id, kind, key, subject, due_at, expires_at, payload, headers, attempts
)
INSERT INTO tidings.deliveries (
    id, kind, key, subject, due_at, finished_at, outcome, attempts, plugin, detail,
    expires_at, payload, headers, event_digest, built_ms
)
SELECT
    gone.id, gone.kind, gone.key, gone.subject, gone.due_at, settled.finished_at, settled.outcome,
    gone.attempts, settled.plugin, settled.detail, gone.expires_at, gone.payload, gone.headers,
    settled.event_digest, settled.built_ms
FROM gone
JOIN settled USING (id)
WHERE settled.outcome = ANY($8)
