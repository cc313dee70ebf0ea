                SELECT
                    id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures,
                    refusals, slot_at, last_error, created_at, recurrence, nominal_at, line, not_before, priority
                FROM shares
                CROSS JOIN LATERAL (
                    SELECT *
                    FROM tidings.schedules
                    WHERE NOT held
                        AND kind = share_kind
                        AND priority = share_priority
                        AND slot_at AT TIME ZONE 'UTC' >= coalesce($4, statement_timestamp() - interval '1 minute') AT TIME ZONE 'UTC'
                        AND slot_at AT TIME ZONE 'UTC' <= statement_timestamp() AT TIME ZONE 'UTC'
                        AND due_at <= statement_timestamp()
                        AND (
                            NOT $5
                            OR pg_column_size(payload)
                                <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                        )
                    ORDER BY slot_at AT TIME ZONE 'UTC'
                    LIMIT share
                    FOR UPDATE SKIP LOCKED
                ) AS waiting
