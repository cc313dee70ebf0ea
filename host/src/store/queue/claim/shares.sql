-- In a backlog the kinds take turns: a claim has room for equally many rows of each kind that has due rows, and what some do not need
-- is for the others. Within a kind the rows go first that have been due for longest, a step of priority counting like a minute. So
-- this reads the first rows of each kind without locking them, a tenth of the claim, and counts how many of each priority are among
-- them.
WITH heads AS MATERIALIZED (
    SELECT kind, priority
    FROM unnest($1) AS kind
    CROSS JOIN generate_series(0, 9) AS priority
    CROSS JOIN LATERAL (
        SELECT
        FROM tidings.schedules
        WHERE NOT held
            AND schedules.kind = kind.kind
            AND schedules.priority = priority.priority
            AND slot_at AT TIME ZONE 'UTC' >= coalesce($4, statement_timestamp() - interval '1 minute') AT TIME ZONE 'UTC'
            AND slot_at AT TIME ZONE 'UTC' <= statement_timestamp() AT TIME ZONE 'UTC'
        ORDER BY slot_at AT TIME ZONE 'UTC'
        LIMIT 1
    ) AS head
    WHERE kind <> ALL(ARRAY(SELECT kind FROM tidings.paused)) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.limits))
), sample AS MATERIALIZED (
    SELECT ceil($2 / 10.0 / nullif(count(DISTINCT kind), 0))::bigint AS rows FROM heads
), first AS MATERIALIZED (
    SELECT kind, priority, count(*) AS rows, sum(count(*)) OVER (PARTITION BY kind) AS of_kind
    FROM (
        SELECT kind, priority, row_number() OVER (PARTITION BY kind ORDER BY place) AS rank
        FROM heads
        CROSS JOIN LATERAL (
            SELECT slot_at - heads.priority * interval '1 minute' AS place
            FROM tidings.schedules
            WHERE NOT held
                AND schedules.kind = heads.kind
                AND schedules.priority = heads.priority
                AND slot_at AT TIME ZONE 'UTC' >= coalesce($4, statement_timestamp() - interval '1 minute') AT TIME ZONE 'UTC'
                AND slot_at AT TIME ZONE 'UTC' <= statement_timestamp() AT TIME ZONE 'UTC'
            ORDER BY slot_at AT TIME ZONE 'UTC'
            LIMIT (SELECT rows FROM sample)
        ) AS row
    ) AS ranked
    WHERE rank <= (SELECT rows FROM sample)
    GROUP BY kind, priority
), shares AS MATERIALIZED (
    SELECT
        kind AS share_kind, priority AS share_priority,
        -- One more than is wanted, so that it is known if there are more.
        CASE WHEN of_kind < sample.rows THEN first.rows + 1 ELSE first.rows + ceil(first.rows * left_over / of_kind) END::bigint AS share
    FROM first
    CROSS JOIN sample
    CROSS JOIN (
        -- What is left, for each of the kinds that seem to have more.
        SELECT
            greatest($2 - sum(rows), 0)
                / nullif(count(DISTINCT kind) FILTER (WHERE of_kind >= (SELECT rows FROM sample)), 0) AS left_over
        FROM first
    ) AS free
    -- The payloads of a claim may be so large together that not all rows fit. So another kind is first each time.
    ORDER BY of_kind, hashtext(kind || statement_timestamp()::text), kind, priority DESC
)
