-- Why: a message comes once at least, and may come again. Its id is written here in the transaction that handles it; a
-- copy finds it there.
--
-- The key holds the consumer: each handles each message once. It ends in the id, which begins with the time it was made
-- (UUIDv7), so that new rows land side by side. source is empty but where ids of several producers could be the same.
-- committed_at is unknown where a topic stamps records itself. processed_at is for pruning; a block range index on it
-- costs next to nothing.
--
-- Run in the consumer's database, as a role that may CREATE in schema public. Safe to run again.
-- Consumers need: GRANT SELECT, INSERT ON public.inbox TO ...; to prune, DELETE and UPDATE besides.

DO $$ BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('public.inbox', 0));
    IF to_regclass('public.inbox') IS NULL THEN
        CREATE TABLE public.inbox (
            consumer     text        NOT NULL,
            source       text        NOT NULL DEFAULT '',
            message_id   text        NOT NULL,
            committed_at timestamptz,
            processed_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (consumer, source, message_id)
        );
        CREATE INDEX ON public.inbox USING brin (processed_at);
    END IF;
END $$;
