-- Takes the turns of the rows that were sent, and says which lines are empty. Lines are locked in the order in which they are given.
WITH used AS MATERIALIZED (
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::timestamptz[])
        AS used (kind, subject, generation, sent, sent_at)
), locked AS MATERIALIZED (
    SELECT line.*
    FROM used
    CROSS JOIN LATERAL (
        SELECT kind, subject
        FROM tidings.lines
        WHERE lines.kind = used.kind AND lines.subject = used.subject
        FOR UPDATE
    ) AS line
)
UPDATE tidings.lines AS changed
SET free_at = CASE
        WHEN sent = 0 THEN changed.free_at
        ELSE greatest(changed.free_at, sent_at - interval '10 ms') + sent * coalesce(step, 0) * interval '1 second'
    END,
    -- Rows that were added since the claim may be invisible to this statement.
    waiting = changed.waiting AND (
        changed.generation <> used.generation
        OR EXISTS (
            SELECT FROM (
                SELECT
                FROM tidings.schedules
                WHERE held AND schedules.kind = changed.kind AND schedules.line = changed.subject
                -- In the order of its index, or the planner may take it into its head to read the table.
                ORDER BY due_at AT TIME ZONE 'UTC' - priority * interval '1 minute'
                LIMIT 1
            ) AS first
        )
    )
FROM used
JOIN locked USING (kind, subject)
LEFT JOIN tidings.limits USING (kind)
WHERE changed.kind = used.kind AND changed.subject = used.subject
