-- Why: a handler that ends its process (a crash in C, memory that runs out) can tell nobody. So before the first messages
-- after a partition was assigned are handled, the attempt is written here; whoever comes next finds how often it failed.
--
-- Run in the consumer's database. Safe to run again.
-- Consumers need: GRANT SELECT, INSERT, UPDATE, DELETE ON public.inbox_attempt TO ...

DO $$ BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('public.inbox', 0));
    IF to_regclass('public.inbox_attempt') IS NULL THEN
        CREATE TABLE public.inbox_attempt (
            consumer   text        NOT NULL,
            source     text        NOT NULL DEFAULT '',
            message_id text        NOT NULL,
            attempts   integer     NOT NULL,
            changed_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (consumer, source, message_id)
        );
    END IF;
END $$;
