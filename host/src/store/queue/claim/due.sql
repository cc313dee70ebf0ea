                SELECT
                    id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures,
                    refusals, slot_at, last_error, created_at, recurrence, nominal_at, line, not_before, priority
                FROM tidings.schedules
                -- The clock must be a stable function to be compared with an index. The due time is
                -- checked as well, so that no row is early even if its slot is wrong.
                WHERE slot_at >= coalesce($4, statement_timestamp() - interval '1 minute')
                    AND slot_at <= statement_timestamp()
                    AND due_at <= statement_timestamp()
                    AND (
                        kind = ANY($1)
                        AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                        -- Their rows wait in lines, soon if not yet.
                        AND kind <> ALL(ARRAY(SELECT kind FROM tidings.limits))
                        OR expires_at <= statement_timestamp()
                    )
                    AND (
                        NOT $5
                        OR pg_column_size(payload)
                            <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                    )
                ORDER BY slot_at
                FOR UPDATE SKIP LOCKED
