-- A producer schedules, cancels and reads, and cannot touch what is the daemon's.
REVOKE ALL ON FUNCTION
    tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text),
    tidings.reschedule(text, text, timestamptz),
    tidings.cancel(text, text),
    tidings.cancel_subject(text),
    tidings.unpark(uuid)
FROM PUBLIC;

GRANT USAGE ON SCHEMA tidings TO tidings_producer, tidings_daemon;

GRANT SELECT, DELETE,
    INSERT (kind, key, subject, due_at, expires_at, payload, headers),
    UPDATE (kind, key, subject, due_at, expires_at, payload, headers)
ON tidings.schedules TO tidings_producer;
GRANT SELECT ON tidings.deliveries, tidings.parked TO tidings_producer;
GRANT EXECUTE ON FUNCTION
    tidings.schedule(text, timestamptz, jsonb, text, text, timestamptz, jsonb, text),
    tidings.reschedule(text, text, timestamptz),
    tidings.cancel(text, text),
    tidings.cancel_subject(text)
TO tidings_producer, tidings_daemon;

GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.schedules, tidings.deliveries, tidings.parked TO tidings_daemon;
GRANT SELECT ON tidings._sqlx_migrations TO tidings_daemon;
GRANT EXECUTE ON FUNCTION tidings.unpark(uuid) TO tidings_daemon;
