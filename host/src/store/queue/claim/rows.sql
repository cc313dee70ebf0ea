-- The beginning of each claim: what is between it and the next part selects and
-- locks the rows.
-- A row has as many units as its payload needs of $2, which are CLAIM_BYTES together. The series makes one
-- after the other, and the LIMIT ends the scan with the last: what lies behind is neither read nor locked.
-- A row that does not fit has no last unit, and no payload; the first always fits.
SELECT
    id,
    kind,
    key,
    subject,
    -- Times in PostgreSQL's binary form: sqlx cannot read a time of whole seconds in its text form.
    timestamptz_send(due_at) AS due_at,
    timestamptz_send(expires_at) AS expires_at,
    -- A larger payload goes alone, and is read in pieces.
    CASE WHEN unit = units AND octet_length(text) <= $3 THEN text END AS payload,
    unit = units AS fits,
    headers::text AS headers,
    attempts,
    failures,
    refusals,
    -- A row in a line has no slot.
    timestamptz_send(CASE WHEN line IS NULL THEN slot_at ELSE due_at END) AS slot_at,
    -- A row that was tried has an error, and so has one that a person put back.
    -- A row that waited for its turn had been due for so long when it was moved into its line.
    CASE
        WHEN last_error IS NULL THEN timestamptz_send(greatest(due_at, created_at))
        WHEN line IS NOT NULL AND last_error = 'waits for its turn (tidings.limit)'
            THEN timestamptz_send(statement_timestamp() - (not_before - greatest(due_at, created_at)))
    END AS untried_since,
    recurrence,
    timestamptz_send(nominal_at) AS nominal_at,
    units,
    line,
    priority,
    NULL AS now,
    NULL AS xid,
    NULL AS next_at,
    NULL AS lines,
    NULL AS shares
FROM (
    SELECT weighed.*, generate_series(1, units) AS unit
    FROM (
        SELECT
            said.*,
            CASE WHEN text IS NULL THEN $2::bigint ELSE least(1 + octet_length(text) * $2 / $3, $2) END AS units
        FROM (
            SELECT
                locked.*,
                -- How much is stored is known without reading it. Compressed, it may be little.
                CASE WHEN pg_column_size(payload) < $3 THEN payload::text END AS text
            FROM (
