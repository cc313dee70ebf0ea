-- Locks the lines whose turn has come, those that have waited for longest first, until the end of the transaction, and notes them
-- in a setting of the transaction. A line that is locked is being delivered, and is left out. What a line allows is read by the next
-- statement, because it may have changed since this statement began.
WITH ready AS MATERIALIZED (
    SELECT kind, subject
    FROM tidings.limits
    CROSS JOIN LATERAL (
        SELECT subject, free_at - (burst - 1) * step * interval '1 second' AS turn_at
        FROM tidings.lines
        WHERE lines.kind = limits.kind
            AND waiting
            AND (by = 'subject' OR subject = '')
            AND free_at <= statement_timestamp() + (burst - 1) * step * interval '1 second'
        ORDER BY free_at
        LIMIT $2
    ) AS head
    WHERE kind = ANY($1) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
    ORDER BY turn_at
    LIMIT $2
)
SELECT set_config('tidings.locked_lines', coalesce(json_agg(json_build_array(kind, subject)), '[]')::text, true)
FROM ready
WHERE pg_try_advisory_xact_lock(hashtextextended('tidings.line ' || kind || ' ' || subject, 0))
