    -- The next turn of the other lines. Of this claim's lines the delivery will tell.
    (
        SELECT timestamptz_send(greatest(turn_at, statement_timestamp()))
        FROM (
            SELECT free_at - (burst - 1) * step * interval '1 second' AS turn_at
            FROM tidings.limits
            CROSS JOIN LATERAL (
                SELECT free_at
                FROM tidings.lines
                WHERE lines.kind = limits.kind
                    AND waiting
                    AND (by = 'subject' OR subject = '')
                    AND NOT EXISTS (SELECT FROM turns WHERE line_kind = lines.kind AND line_subject = subject)
                ORDER BY free_at
                LIMIT 1
            ) AS head
            WHERE kind = ANY($1) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
            ORDER BY turn_at
            LIMIT 1
        ) AS next
    ),
    (SELECT json_agg(json_build_array(line_kind, line_subject, generation))::text FROM turns)
