-- Why: the relay should run with the least it needs, and whoever watches it with less.
--
--   cdc_outbox_relay   logs in and streams. It needs no SELECT on the outbox and gets none. Be aware what REPLICATION
--                      means in PostgreSQL: it may stream any table through any publication, and drop any slot.
--   cdc_outbox_reader  cannot log in; GRANT it to whoever may read the relay's state (not the events).
--
-- Roles belong to the whole server. One that exists already is left as it is. Where this database's administrator may
-- not create a role with REPLICATION (managed services), a warning says so: make the role the provider's way
-- (for example GRANT rds_replication), or let the relay connect as a role you have.
-- cdc_outbox_relay has no password, so it cannot log in with one until you set it:
--     ALTER ROLE cdc_outbox_relay PASSWORD '...';   -- or a certificate, or peer
--
-- Run as: a role with CREATEROLE that may grant REPLICATION. Safe to run again.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        CREATE ROLE cdc_outbox_reader NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_relay') THEN
        CREATE ROLE cdc_outbox_relay LOGIN REPLICATION;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE WARNING 'roles of cdc-outbox were not created: %', SQLERRM
            USING HINT = 'Let an administrator run sql/0004_roles.sql, or use roles of your own.';
    WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this server is being migrated at this very moment
END $$;

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        GRANT USAGE ON SCHEMA cdc_outbox TO cdc_outbox_reader;
        GRANT SELECT ON ALL TABLES IN SCHEMA cdc_outbox TO cdc_outbox_reader;
        ALTER DEFAULT PRIVILEGES IN SCHEMA cdc_outbox GRANT SELECT ON TABLES TO cdc_outbox_reader;
    END IF;
END $$;
