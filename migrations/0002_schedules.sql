-- Pending rows only: a row that is finished moves to tidings.deliveries, one that is set aside to tidings.parked.

-- A time-ordered id (RFC 9562, version 7): milliseconds first, so that inserts touch one end of the index.
-- Bodies are parsed when the function is made, so no search_path of a session can change what they call.
CREATE FUNCTION tidings.uuid_v7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN encode(
        -- Of a random version 4 id: the first 48 bits become the time, and two more bits turn the 4 into a 7.
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                PLACING substring(int8send(floor(date_part('epoch', clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex')::uuid;

-- The instant a row is written. The transaction takes its number before the clock is read: whoever later finds every
-- lower number finished knows that no row with an earlier instant can still appear.
CREATE FUNCTION tidings.arrival() RETURNS timestamptz
    LANGUAGE sql VOLATILE
    RETURN CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END;

CREATE FUNCTION tidings.header_names_are_allowed(headers jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT coalesce(bool_and(
        octet_length(name) BETWEEN 1 AND 255
        AND NOT starts_with(name, 'tidings-')
        AND NOT starts_with(name, 'x-')
        AND name NOT IN ('CC', 'BCC')
    ), true)
    FROM jsonb_object_keys(CASE WHEN jsonb_typeof(headers) = 'object' THEN headers ELSE '{}' END) AS name;
END;

-- The names of the constraints are the sentences that a producer reads when it breaks one.
CREATE TABLE tidings.schedules (
    id uuid PRIMARY KEY DEFAULT tidings.uuid_v7(),
    kind text NOT NULL
        CONSTRAINT "kind must match [a-z0-9][a-z0-9._-]{0,99}"
        CHECK (kind ~ '^[a-z0-9][a-z0-9._-]{0,99}$'),
    key text
        CONSTRAINT "key must be 1 to 255 bytes"
        CHECK (octet_length(key) BETWEEN 1 AND 255),
    subject text
        CONSTRAINT "subject must be 1 to 255 bytes"
        CHECK (octet_length(subject) BETWEEN 1 AND 255),
    due_at timestamptz NOT NULL
        CONSTRAINT "due_at must be between the years 1970 and 9999"
        CHECK (due_at >= '1970-01-01 00:00:00+00' AND due_at < '10000-01-01 00:00:00+00'),
    expires_at timestamptz
        CONSTRAINT "expires_at must be between the years 1970 and 9999"
        CHECK (expires_at >= '1970-01-01 00:00:00+00' AND expires_at < '10000-01-01 00:00:00+00'),
    payload jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT "payload must be at most 16 MiB"
        CHECK (pg_column_size(payload) <= 16777216),
    headers jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT "headers must be an object of strings, 16 KiB together"
        CHECK (
            headers = '{}'
            OR jsonb_typeof(headers) = 'object'
            AND octet_length(headers::text) <= 16384
            AND NOT jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")', '{}', true)
        )
        CONSTRAINT "headers must not be named tidings-*, x-*, CC, BCC or ''"
        CHECK (headers = '{}' OR tidings.header_names_are_allowed(headers)),
    attempts integer NOT NULL DEFAULT 0,
    last_error text,
    created_at timestamptz NOT NULL DEFAULT now(),

    -- Internal, written by the daemon alone.
    failures integer NOT NULL DEFAULT 0,
    refusals integer NOT NULL DEFAULT 0,
    held boolean NOT NULL DEFAULT false,
    not_before timestamptz NOT NULL DEFAULT tidings.arrival(),
    -- The queue key. Derived, so that no writer can leave it out or get it wrong, triggers or not.
    slot_at timestamptz NOT NULL GENERATED ALWAYS AS (
        CASE
            WHEN held THEN coalesce(expires_at, 'infinity')
            ELSE greatest(due_at, not_before)
        END
    ) STORED,

    CONSTRAINT "expires_at must be after due_at" CHECK (expires_at > due_at)
) WITH (
    fillfactor = 90,
    -- Finished rows are deleted, so dead entries gather at the head of the queue: clean often, indexes included.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0,
    vacuum_index_cleanup = on,
    toast.autovacuum_vacuum_scale_factor = 0.02
);

-- The one index that the daemon's loop reads.
CREATE INDEX schedules_slot_at ON tidings.schedules (slot_at);
-- A key names one pending row of its kind; rows without a key cost nothing here.
CREATE UNIQUE INDEX schedules_kind_key ON tidings.schedules (kind, key) WHERE key IS NOT NULL;
-- For tidings.cancel_subject.
CREATE INDEX schedules_subject ON tidings.schedules (subject) WHERE subject IS NOT NULL;
-- To release the held rows of a kind when its plugin arrives.
CREATE INDEX schedules_held ON tidings.schedules (kind) WHERE held;

COMMENT ON TABLE tidings.schedules IS 'Rows that wait to become messages. Write kind, key, subject, due_at, expires_at, payload and headers; the rest is the daemon''s.';
COMMENT ON COLUMN tidings.schedules.id IS 'Becomes the message_id; new whenever due_at changes.';
COMMENT ON COLUMN tidings.schedules.kind IS 'Selects the plugin that builds the event.';
COMMENT ON COLUMN tidings.schedules.key IS 'Natural name within the kind: at most one pending row has it.';
COMMENT ON COLUMN tidings.schedules.subject IS 'What the row is about, for tidings.cancel_subject.';
COMMENT ON COLUMN tidings.schedules.due_at IS 'Never published before this instant by the database clock.';
COMMENT ON COLUMN tidings.schedules.expires_at IS 'Never published after this instant; null means no deadline.';
COMMENT ON COLUMN tidings.schedules.payload IS 'What the plugin is given, any JSON.';
COMMENT ON COLUMN tidings.schedules.headers IS 'Message headers, strings only; traceparent belongs here.';
COMMENT ON COLUMN tidings.schedules.attempts IS 'Builds that ended in a trap, a blown limit or the plugin''s wish to retry.';
COMMENT ON COLUMN tidings.schedules.last_error IS 'Why the row is still here although it was due.';
COMMENT ON COLUMN tidings.schedules.failures IS 'Attempts that count towards TIDINGS_MAX_ATTEMPTS: traps and blown limits.';
COMMENT ON COLUMN tidings.schedules.refusals IS 'Times in a row that the broker could not route or refused the message.';
COMMENT ON COLUMN tidings.schedules.held IS 'No daemon serves the kind; out of the queue until one does.';
COMMENT ON COLUMN tidings.schedules.not_before IS 'When the row was written, or the end of its backoff.';
COMMENT ON COLUMN tidings.schedules.slot_at IS 'Where the row stands in the queue.';
