-- To withdraw what a recurrence has made when it is changed, paused or stopped. Rows of other origin cost nothing here. No row
-- has a recurrence yet, so the index is made by reading the table once; rows can be read meanwhile, and not written. (An index
-- that is made CONCURRENTLY waits for every older transaction, a second `tidings migrate` among them, which waits for this one.)
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            CREATE INDEX schedules_recurrence ON tidings.schedules (recurrence, nominal_at) WHERE recurrence IS NOT NULL;
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
