-- cdc-outbox: only if outbox.table = public.outbox
--
-- Why: the event is a row, written in the same transaction as the change it tells of. Commit both or neither.
--
-- payload is json, not jsonb: Kafka then gets the very bytes the application wrote, and PostgreSQL spends about a third
-- less on decoding them. A NULL payload becomes a tombstone. headers is a JSON object of strings; each becomes a Kafka
-- header. Deleting rows is free for the relay: it reads the log, not the table. Delete in the same transaction, later,
-- or never.
--
-- Run as: a role that may CREATE in schema public. Safe to run again.

CREATE TABLE IF NOT EXISTS public.outbox (
    id             uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    aggregate_type text        NOT NULL DEFAULT 'event',
    aggregate_id   text        NOT NULL,
    event_type     text        NOT NULL,
    payload        json,
    headers        json        CHECK (json_typeof(headers) = 'object'),
    created_at     timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE public.outbox IS
    'Events to publish. cdc-outbox carries each inserted row to Kafka after its transaction has committed';
COMMENT ON COLUMN public.outbox.aggregate_type IS 'Chooses the topic: outbox.<aggregate_type> by default';
COMMENT ON COLUMN public.outbox.aggregate_id IS 'The Kafka key: events of one aggregate stay in commit order';
