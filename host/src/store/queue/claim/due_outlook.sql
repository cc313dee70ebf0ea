    timestamptz_send(least(
        (
            SELECT slot_at
            FROM tidings.schedules
            WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
            ORDER BY slot_at
            LIMIT 1
        ),
        (SELECT min(until) FROM tidings.paused)
    )),
    NULL
