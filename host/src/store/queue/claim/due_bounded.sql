                -- While there are limits, many rows may stand at the head of the queue that no claim takes, until they are in
                -- their lines. So the claim looks at the first 20,000 rows, and then locks those that it may take.
                SELECT
                    id, waiting.kind, key, subject, due_at, waiting.expires_at, payload, headers, attempts, failures,
                    refusals, slot_at, last_error, created_at, recurrence, nominal_at, line, not_before, priority
                FROM (
                    SELECT tableoid AS partition, ctid AS place, kind, expires_at
                    FROM tidings.schedules
                    WHERE slot_at >= coalesce($4, statement_timestamp() - interval '1 minute')
                        AND slot_at <= statement_timestamp()
                    ORDER BY slot_at
                    LIMIT 20000
                ) AS head
                CROSS JOIN LATERAL (
                    SELECT *
                    FROM tidings.schedules
                    WHERE tableoid = head.partition
                        AND ctid = head.place
                        AND slot_at <= statement_timestamp()
                        AND due_at <= statement_timestamp()
                        AND (
                            NOT $5
                            OR pg_column_size(payload)
                                <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                        )
                    FOR UPDATE SKIP LOCKED
                ) AS waiting
                WHERE head.kind = ANY($1)
                    AND head.kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                    AND head.kind <> ALL(ARRAY(SELECT kind FROM tidings.limits))
                    OR head.expires_at <= statement_timestamp()
