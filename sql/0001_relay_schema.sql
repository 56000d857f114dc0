-- Why: what the relay has to remember lives in a schema of its own, away from the application's tables.
-- The position in the log does not: that is the replication slot's, and only its.
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
