-- Once somebody publishes every table (CREATE PUBLICATION p FOR ALL TABLES), PostgreSQL refuses to delete from one whose rows
-- it could not name to a subscriber, and retention would fail. The other tables are named by their primary keys. This one
-- has none, so that writing history cannot fail and costs no further index: the whole row is its name. That is written to
-- the WAL with each row that retention removes, and only where wal_level is logical; an INSERT costs nothing more.
-- The lock keeps daemons from writing history. It is not waited for while they stand behind us for longer than half a second.
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            ALTER TABLE tidings.deliveries REPLICA IDENTITY FULL;
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                tries := tries + 1;
                IF tries = 60 THEN
                    RAISE EXCEPTION 'tidings.deliveries is in use by long transactions: end them, or migrate again when they have ended'
                        USING ERRCODE = 'lock_not_available';
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
END
$$;
