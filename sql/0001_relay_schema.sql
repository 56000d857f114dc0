-- Why: what the relay has to remember lives in a schema of its own, away from the application's tables.
-- The slot holds the position in the log; cdc_outbox.confirmation checks it, and says where to read on after a crash.
--
-- Run as: a role that may CREATE in this database. Safe to run again.

CREATE SCHEMA IF NOT EXISTS cdc_outbox;

COMMENT ON SCHEMA cdc_outbox IS 'State of the cdc-outbox relay';

CREATE TABLE IF NOT EXISTS cdc_outbox.schema_migration (
    name       text        PRIMARY KEY,
    sha256     text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.schema_migration IS
    'Files of sql/ that were applied by `cdc-outbox migrate up`, each with the SHA-256 it had then';
