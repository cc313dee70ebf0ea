-- Rows set aside for a person. They hold no key: another row may take it meanwhile.
CREATE TABLE tidings.parked (
    id uuid PRIMARY KEY,
    kind text NOT NULL,
    key text,
    subject text,
    due_at timestamptz NOT NULL,
    expires_at timestamptz,
    payload jsonb NOT NULL,
    headers jsonb NOT NULL,
    attempts integer NOT NULL,
    last_error text,
    created_at timestamptz NOT NULL,
    reason text NOT NULL,
    plugin text,
    parked_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON TABLE tidings.parked IS 'Schedules set aside for a person, with the reason; tidings.unpark(id) puts one back.';
COMMENT ON COLUMN tidings.parked.plugin IS 'name@version+digest8 of the plugin that could not build it.';
