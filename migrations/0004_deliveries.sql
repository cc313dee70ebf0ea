-- The history of what was finished. No unique constraint and no foreign key: writing history must never be what
-- makes a delivery fail after its message was confirmed.
CREATE TABLE tidings.deliveries (
    id uuid NOT NULL,
    kind text NOT NULL,
    key text,
    subject text,
    due_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    outcome text NOT NULL,
    attempts integer NOT NULL,
    plugin text,
    detail text,
    expires_at timestamptz,
    payload jsonb NOT NULL,
    headers jsonb NOT NULL,
    event_digest text,
    CONSTRAINT "outcome must be delivered, expired or skipped"
        CHECK (outcome IN ('delivered', 'expired', 'skipped'))
);

-- Retention removes the oldest; rows arrive in that order, which is what a BRIN index is for.
CREATE INDEX deliveries_finished_at ON tidings.deliveries USING brin (finished_at) WITH (autosummarize = on);
-- "What became of this id?"
CREATE INDEX deliveries_id ON tidings.deliveries (id);

COMMENT ON TABLE tidings.deliveries IS 'What became of finished schedules, kept for TIDINGS_HISTORY_DAYS.';
COMMENT ON COLUMN tidings.deliveries.finished_at IS 'The instant of the confirm, by the database clock.';
COMMENT ON COLUMN tidings.deliveries.outcome IS 'delivered: confirmed by the broker; expired: past its deadline, never sent; skipped: the plugin said that there is nothing to send.';
COMMENT ON COLUMN tidings.deliveries.plugin IS 'name@version+digest8 of the plugin that built it; null if none was asked.';
COMMENT ON COLUMN tidings.deliveries.detail IS 'Why it was skipped or when it expired.';
COMMENT ON COLUMN tidings.deliveries.event_digest IS 'SHA-256 of the event, in hexadecimal, to compare what another version of the plugin would build.';
