-- Why: an outbox may be silent because nothing happens, or because nothing arrives. A canary is a row that arrives on
-- purpose: planted by the relay every canary.every_seconds (off by default) and by `cdc-outbox doctor`, it goes the way
-- of every event, into a topic of its own. The table is an outbox like any other, so it belongs to the publication.
--
-- A canary is deleted in the transaction that writes it: it is in the log, and the table stays empty.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.canary (
    id           uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    aggregate_id text        NOT NULL,
    event_type   text        NOT NULL DEFAULT 'canary',
    payload      json        NOT NULL DEFAULT '{}',
    planted_at   timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.canary IS 'A row that goes through the relay on purpose, to see that it arrives';
COMMENT ON COLUMN cdc_outbox.canary.aggregate_id IS 'The slot it is meant for';
