-- Puts tidings.schedules_new into the place of tidings.schedules, with its owner, grants, comment and names.
DO $$
DECLARE
    old CONSTANT oid := 'tidings.schedules'::regclass;
    new CONSTANT oid := 'tidings.schedules_new'::regclass;
    former pg_class;
    place record;
    access record;
BEGIN
    SELECT * INTO STRICT former FROM pg_class WHERE oid = old;

    -- A platform may grant rights on every new table. These tables have the rights that were there before, and the partitions,
    -- which nobody but their owner names, have none.
    FOR place IN
        SELECT oid, oid::regclass AS name
        FROM pg_class
        WHERE oid = new OR oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = new)
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO %I', place.name, pg_get_userbyid(former.relowner));
        FOR access IN
            SELECT DISTINCT CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS grantee
            FROM pg_class
            CROSS JOIN LATERAL aclexplode(relacl) AS granted
            WHERE pg_class.oid = place.oid AND granted.grantee <> former.relowner
        LOOP
            EXECUTE format('REVOKE ALL ON %s FROM %s', place.name, access.grantee);
        END LOOP;
    END LOOP;
    FOR access IN
        SELECT
            privilege_type || coalesce(' (' || quote_ident(attname) || ')', '') AS right,
            CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS grantee,
            CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS option
        FROM (
            SELECT NULL::name AS attname, granted.* FROM aclexplode(former.relacl) AS granted
            UNION ALL
            SELECT attname, granted.*
            FROM pg_attribute
            CROSS JOIN LATERAL aclexplode(attacl) AS granted
            WHERE attrelid = old
        ) AS granted
        WHERE grantee <> former.relowner
    LOOP
        EXECUTE format('GRANT %s ON tidings.schedules_new TO %s%s', access.right, access.grantee, access.option);
    END LOOP;

    EXECUTE format('COMMENT ON TABLE tidings.schedules_new IS %L', obj_description(old, 'pg_class'));
    IF former.relrowsecurity THEN
        ALTER TABLE tidings.schedules_new ENABLE ROW LEVEL SECURITY;
    END IF;
    IF former.relforcerowsecurity THEN
        ALTER TABLE tidings.schedules_new FORCE ROW LEVEL SECURITY;
    END IF;

    DROP TABLE tidings.schedules;
    -- The table, its partitions, its indexes and theirs: schedules_new_3 becomes schedules_3.
    FOR place IN
        SELECT oid::regclass AS name, replace(relname, 'schedules_new', 'schedules') AS becomes, relkind IN ('i', 'I') AS is_index
        FROM pg_class
        WHERE relnamespace = 'tidings'::regnamespace AND starts_with(relname, 'schedules_new') AND relkind IN ('r', 'p', 'i', 'I')
    LOOP
        EXECUTE format(
            'ALTER %s %s RENAME TO %I', CASE WHEN place.is_index THEN 'INDEX' ELSE 'TABLE' END, place.name, place.becomes
        );
    END LOOP;
END
$$
