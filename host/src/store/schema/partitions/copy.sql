-- Makes tidings.schedules_new with the columns, rules, comments, storage settings and rows of tidings.schedules, which this
-- transaction has locked. It has as many partitions as tidings.partitions says, or is a plain table if that is 1. It has no
-- index, trigger or grant yet.
DO $$
DECLARE
    partitions CONSTANT integer := current_setting('tidings.partitions')::integer;
    -- A plain table, or the first of the partitions: all of them have the same settings.
    storage CONSTANT regclass := coalesce(
        (SELECT min(inhrelid) FROM pg_inherits WHERE inhparent = 'tidings.schedules'::regclass),
        'tidings.schedules'::regclass
    )::regclass;
    options text;
    columns text;
BEGIN
    SELECT 'WITH (' || string_agg(option, ', ') || ')' INTO options
    FROM pg_class AS class
    LEFT JOIN pg_class AS toast ON toast.oid = class.reltoastrelid
    CROSS JOIN LATERAL (
        SELECT unnest(class.reloptions) UNION ALL SELECT 'toast.' || unnest(toast.reloptions)
    ) AS options (option)
    WHERE class.oid = storage;

    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns
    FROM pg_attribute
    WHERE attrelid = 'tidings.schedules'::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '';

    IF partitions = 1 THEN
        EXECUTE 'CREATE TABLE tidings.schedules_new (LIKE tidings.schedules INCLUDING ALL EXCLUDING INDEXES) ' || coalesce(options, '');
    ELSE
        -- By what must be unique, which PostgreSQL checks within a partition only.
        CREATE TABLE tidings.schedules_new (LIKE tidings.schedules INCLUDING ALL EXCLUDING INDEXES) PARTITION BY HASH (kind, key);
        FOR number IN 0 .. partitions - 1 LOOP
            EXECUTE format(
                'CREATE TABLE tidings.schedules_new_%1$s PARTITION OF tidings.schedules_new FOR VALUES WITH (MODULUS %2$s, REMAINDER %1$s) ',
                number, partitions
            ) || coalesce(options, '');
            -- Without a primary key this names the rows, once somebody publishes every table.
            EXECUTE format('ALTER TABLE tidings.schedules_new_%s REPLICA IDENTITY FULL', number);
        END LOOP;
    END IF;
    EXECUTE format('INSERT INTO tidings.schedules_new (%1$s) SELECT %1$s FROM tidings.schedules', columns);
END
$$
