-- Why: a policy says what may go to Kafka and what stays inside. It comes to the relay through the log, as a request, and
-- is in force from that place on. The relay records here which policy is in force from where: an event that the log
-- brings once more is judged as it was the first time, whichever relay reads it.
--
-- Rows of this table are never changed. To go back to an older policy, activate it again.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.policy (
    id                bigint      GENERATED ALWAYS AS IDENTITY,
    system_identifier text        NOT NULL,
    slot              text        NOT NULL,
    -- the request's place in the log: it governs all that comes behind it
    commit_lsn        pg_lsn      NOT NULL,
    ordinal           integer     NOT NULL,
    sha256            bytea       NOT NULL,
    source            text        NOT NULL,
    principal         text        NOT NULL,
    reason            text        NOT NULL,
    at                timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (system_identifier, slot, commit_lsn, ordinal)
);

COMMENT ON TABLE cdc_outbox.policy IS
    'The policies that were activated, and from where in the log each governs. See `cdc-outbox policy log`';
COMMENT ON COLUMN cdc_outbox.policy.sha256 IS 'Of the source''s bytes in UTF-8';
COMMENT ON COLUMN cdc_outbox.policy.principal IS 'Who asked for it';
