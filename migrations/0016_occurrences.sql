-- A row that a recurrence made has the recurrence's name, and the instant that its rule says. Producers cannot write these
-- columns. The new columns are empty, so no row is written; the lock keeps everybody from the tables for a moment. It is not
-- waited for while others stand behind us for longer than half a second.
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            ALTER TABLE tidings.schedules ADD COLUMN recurrence text, ADD COLUMN nominal_at timestamptz;
            ALTER TABLE tidings.parked ADD COLUMN recurrence text, ADD COLUMN nominal_at timestamptz;
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                tries := tries + 1;
                IF tries = 60 THEN
                    RAISE EXCEPTION 'tidings.schedules is in use by long transactions: end them, or migrate again when they have ended'
                        USING ERRCODE = 'lock_not_available';
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
END
$$;

COMMENT ON COLUMN tidings.schedules.recurrence IS 'The name of the recurrence that made the row; null for all other rows.';
COMMENT ON COLUMN tidings.schedules.nominal_at IS 'The instant that the rule of the recurrence says, before its spread.';
COMMENT ON COLUMN tidings.parked.recurrence IS 'The name of the recurrence that made the row; null for all other rows.';
COMMENT ON COLUMN tidings.parked.nominal_at IS 'The instant that the rule of the recurrence says, before its spread.';
