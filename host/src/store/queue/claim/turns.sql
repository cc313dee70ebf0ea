-- By the generic cell rate algorithm, free_at is when the next row may go, `step` later for each row that went; with a burst, so
-- many steps before. A claim takes what would be free within 10 ms, and makes up for up to 10 ms of delay. So a thousand rows a second
-- need a hundred claims, and a claim that is late by a millisecond does not slow a line down.
WITH turns AS MATERIALIZED (
    SELECT
        lines.kind AS line_kind,
        lines.subject AS line_subject,
        generation,
        least(
            $2,
            burst + floor(
                date_part('epoch', statement_timestamp() - greatest(free_at, statement_timestamp() - interval '10 ms') + interval '10 ms')
                / step
            )
        )::bigint AS allowed
    FROM json_array_elements(current_setting('tidings.locked_lines')::json) AS locked
    JOIN tidings.lines ON lines.kind = locked ->> 0 AND lines.subject = locked ->> 1
    JOIN tidings.limits ON limits.kind = lines.kind
    WHERE free_at <= statement_timestamp() + (burst - 1) * step * interval '1 second'
)
