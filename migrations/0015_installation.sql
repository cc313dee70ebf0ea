-- One row at most: which installation this is, and from which server daemons last delivered its rows. A copy of the database has the same
-- id as its origin, and the origin's server; that is how a daemon can tell that it works on a copy.
CREATE TABLE tidings.installation (
    singleton boolean PRIMARY KEY DEFAULT true
        CONSTRAINT "there is only one row" CHECK (singleton),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    servers jsonb NOT NULL DEFAULT '[]'
);
COMMENT ON TABLE tidings.installation IS 'One row at most: the id that this database shares with its copies, and where its rows were last delivered.';
COMMENT ON COLUMN tidings.installation.id IS 'Made when the first daemon started, and the same in every copy of the database.';
COMMENT ON COLUMN tidings.installation.servers IS 'From where daemons last delivered, written by them: one server, by each address at which they reached it.';

-- The first daemon writes the row: where a platform forces row-level security on each new table, nobody can write here yet.
GRANT SELECT, INSERT, UPDATE ON tidings.installation TO tidings_daemon;
