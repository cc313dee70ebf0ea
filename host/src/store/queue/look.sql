-- Each part reads one index entry, however many rows wait and whatever the planner estimates: held rows are read in the order of
-- their index, kind by kind, and there are few pauses.
WITH ours AS MATERIALIZED (
    SELECT kind FROM unnest($1::text[]) AS kind EXCEPT SELECT kind FROM tidings.paused
), head AS MATERIALIZED (
    SELECT slot_at, expires_at, kind
    FROM tidings.schedules
    WHERE slot_at >= coalesce($2, statement_timestamp() - interval '1 minute')
    ORDER BY slot_at
    LIMIT 1
), below AS MATERIALIZED (
    SELECT slot_at
    FROM tidings.schedules
    WHERE $3 AND slot_at < coalesce($2, statement_timestamp() - interval '1 minute')
    ORDER BY slot_at
    LIMIT $4
)
SELECT
    statement_timestamp() AS "now!",
    (SELECT min(slot_at) FROM below) AS below_first,
    (SELECT count(*) FROM below) AS "below_rows!",
    coalesce($2, statement_timestamp() - interval '1 minute') AS "mark!",
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS "oldest_xid!",
    -- A snapshot ends after the highest number that has ended; there may be some above that are running.
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint
        + age(pg_snapshot_xmax(pg_current_snapshot())::xid) AS "next_xid!",
    (SELECT to_timestamp(last_value / 1e6::float8) FROM tidings.polling_until) AS "polling_until!",
    (SELECT slot_at FROM head WHERE slot_at < 'infinity') AS first_at,
    coalesce((SELECT slot_at <= statement_timestamp() FROM head), false) AS "due!",
    coalesce(
        (
            SELECT
                slot_at <= statement_timestamp()
                AND (expires_at <= statement_timestamp()) IS NOT TRUE
                AND kind = ANY($1)
                AND (kind IN (SELECT kind FROM tidings.paused) OR kind IN (SELECT kind FROM tidings.limits))
            FROM head
        ),
        false
    ) AS "not_claimable_first!",
    EXISTS (SELECT FROM tidings.limits) AS "has_limits!",
    least(
        -- Only if the head is due is there a reason to go down the index once more.
        CASE
            WHEN (SELECT slot_at > statement_timestamp() FROM head) THEN
                (SELECT slot_at FROM head WHERE slot_at < 'infinity')
            ELSE
                (
                    SELECT slot_at
                    FROM tidings.schedules
                    WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
                    ORDER BY slot_at
                    LIMIT 1
                )
        END,
        (SELECT min(until) FROM tidings.paused)
    ) AS next_at,
    ARRAY(
        SELECT kind
        FROM ours
        WHERE EXISTS (
            SELECT FROM (
                SELECT waiting.line
                FROM tidings.schedules AS waiting
                WHERE waiting.held AND waiting.kind >= ours.kind AND waiting.kind <= ours.kind AND waiting.line IS NULL
                ORDER BY waiting.kind
                LIMIT 1
            ) AS held
        )
        UNION
        SELECT kind FROM tidings.lifted WHERE kind = ANY($1)
    ) AS "held_for_us!",
    (
        SELECT greatest(turn_at, statement_timestamp())
        FROM (
            SELECT free_at - (burst - 1) * step * interval '1 second' AS turn_at
            FROM tidings.limits
            CROSS JOIN LATERAL (
                SELECT free_at
                FROM tidings.lines
                WHERE lines.kind = limits.kind AND waiting AND (by = 'subject' OR subject = '')
                ORDER BY free_at
                LIMIT 1
            ) AS head
            WHERE kind IN (SELECT kind FROM ours)
            ORDER BY turn_at
            LIMIT 1
        ) AS next_turn
    ) AS turn_at,
    (
        SELECT greatest(make_at, statement_timestamp())
        FROM tidings.recurrences
        -- As in the queue, entries of recurrences that have moved on lie before; a sweep reads them as well.
        WHERE make_at >= CASE
                WHEN $3 THEN '-infinity'
                ELSE statement_timestamp() - interval '1 minute'
            END
            AND make_at < 'infinity'
        ORDER BY make_at
        LIMIT 1
    ) AS make_at,
    ARRAY(SELECT kind FROM tidings.catch_ups ORDER BY kind) AS "missed_kinds!",
    ARRAY(
        SELECT extract(epoch FROM within)::float8 FROM tidings.catch_ups ORDER BY kind
    ) AS "missed_after!"
