-- A row has as many units as its payload needs of $2, which are CLAIM_BYTES together. The series makes one
-- after the other, and the LIMIT ends the scan with the last: what lies behind is neither read nor locked.
-- A row that does not fit has no last unit, and no payload; the first always fits.
SELECT
    id,
    kind,
    key,
    subject,
    -- Times in PostgreSQL's binary form: sqlx cannot read a time of whole seconds in its text form.
    timestamptz_send(due_at) AS due_at,
    timestamptz_send(expires_at) AS expires_at,
    -- A larger payload goes alone, and is read in pieces.
    CASE WHEN unit = units AND octet_length(text) <= $3 THEN text END AS payload,
    unit = units AS fits,
    headers::text AS headers,
    attempts,
    failures,
    refusals,
    timestamptz_send(slot_at) AS slot_at,
    -- A row that was tried has an error, and so has one that a person put back.
    CASE WHEN last_error IS NULL THEN timestamptz_send(greatest(due_at, created_at)) END AS untried_since,
    recurrence,
    timestamptz_send(nominal_at) AS nominal_at,
    units,
    NULL AS now,
    NULL AS xid,
    NULL AS next_at
FROM (
    SELECT weighed.*, generate_series(1, units) AS unit
    FROM (
        SELECT
            said.*,
            CASE WHEN text IS NULL THEN $2::bigint ELSE least(1 + octet_length(text) * $2 / $3, $2) END AS units
        FROM (
            SELECT
                locked.*,
                -- How much is stored is known without reading it. Compressed, it may be little.
                CASE WHEN pg_column_size(payload) < $3 THEN payload::text END AS text
            FROM (
                SELECT
                    id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures,
                    refusals, slot_at, last_error, created_at, recurrence, nominal_at
                FROM tidings.schedules
                -- The clock must be a stable function to be compared with an index. The due time is
                -- checked as well, so that no row is early even if its slot is wrong.
                WHERE slot_at >= coalesce($4, statement_timestamp() - interval '1 minute')
                    AND slot_at <= statement_timestamp()
                    AND due_at <= statement_timestamp()
                    AND (
                        kind = ANY($1) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                        OR expires_at <= statement_timestamp()
                    )
                    AND (
                        NOT $5
                        OR pg_column_size(payload)
                            <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                    )
                ORDER BY slot_at
                FOR UPDATE SKIP LOCKED
            ) AS locked
            -- So that the text is made once.
            OFFSET 0
        ) AS said
    ) AS weighed
    LIMIT $2
) AS taken
WHERE unit IN (1, units)
-- A claim without rows has an answer as well. This part comes last, when the number has been taken.
UNION ALL
SELECT
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    timestamptz_send(statement_timestamp()),
    pg_current_xact_id_if_assigned()::text::bigint,
    timestamptz_send(least(
        (
            SELECT slot_at
            FROM tidings.schedules
            WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
            ORDER BY slot_at
            LIMIT 1
        ),
        (SELECT min(until) FROM tidings.paused)
    ))
