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
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    timestamptz_send(statement_timestamp()),
    pg_current_xact_id_if_assigned()::text::bigint,
