-- When the last pass over the dead letters began: a daemon that crashes and starts again and again must not replay them at
-- every start. One row for each exchange that daemons of this database publish to.
CREATE TABLE tidings.passes (
    exchange text PRIMARY KEY,
    began_at timestamptz NOT NULL
);

COMMENT ON TABLE tidings.passes IS 'When the last pass over the dead letters of an exchange began.';

GRANT SELECT, INSERT, UPDATE, DELETE ON tidings.passes TO tidings_daemon;
