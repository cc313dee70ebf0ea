-- With the time that its plugin was given, an event can be built again exactly as it was, and beside what another
-- version of the plugin would make of it (`tidings plugin replay`).
ALTER TABLE tidings.deliveries ADD COLUMN built_ms bigint;

COMMENT ON COLUMN tidings.deliveries.built_ms IS 'The now-ms that the plugin was given, in milliseconds since the Unix epoch; null if nothing was built, or by a release that did not note it.';
