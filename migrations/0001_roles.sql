-- The two roles that grants are given to. They cannot log in: an application's and the daemon's own login roles are
-- made members of them (GRANT tidings_producer TO shop). Roles belong to the whole server, so another database may
-- have made them already, perhaps at this moment.
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['tidings_producer', 'tidings_daemon'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                WHEN duplicate_object OR unique_violation THEN
                    NULL;
                WHEN insufficient_privilege THEN
                    RAISE EXCEPTION 'role "%" does not exist and % may not create it', wanted, current_user
                        USING ERRCODE = 'insufficient_privilege',
                              HINT = format('Have an administrator run: CREATE ROLE %I NOLOGIN; then migrate again.', wanted);
            END;
        END IF;
    END LOOP;
END
$$;
