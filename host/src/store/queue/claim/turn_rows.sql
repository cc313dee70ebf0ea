                SELECT
                    id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures,
                    refusals, slot_at, last_error, created_at, recurrence, nominal_at, line, not_before, priority
                FROM turns
                CROSS JOIN LATERAL (
                    SELECT *
                    FROM tidings.schedules
                    WHERE held
                        AND schedules.kind = line_kind
                        AND line = line_subject
                        AND due_at <= statement_timestamp()
                        AND (
                            NOT $5
                            OR pg_column_size(payload)
                                <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                        )
                    -- In the order of its index.
                    ORDER BY due_at AT TIME ZONE 'UTC' - priority * interval '1 minute'
                    LIMIT allowed
                    FOR UPDATE SKIP LOCKED
                ) AS waiting
