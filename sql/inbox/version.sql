-- Why: a projection must not be set back by an event that comes late, or again. The latest version of each aggregate that
-- a consumer has seen is kept here. An aggregate is a topic and a key; a version is ordered byte by byte. Its first letter
-- is its kind: n a number, t a text, s the relay's sequence.
--
-- Rows are never pruned: a tombstone's version keeps what came before it from coming back.
--
-- Run in the consumer's database. Safe to run again.
-- Consumers need: GRANT SELECT, INSERT, UPDATE ON public.inbox_version TO ...

DO $$ BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('public.inbox', 0));
    IF to_regclass('public.inbox_version') IS NULL THEN
        CREATE TABLE public.inbox_version (
            consumer text NOT NULL,
            source   text NOT NULL DEFAULT '',
            topic    text NOT NULL DEFAULT '',
            subject  text NOT NULL,
            version  text COLLATE "C" NOT NULL,
            PRIMARY KEY (consumer, source, topic, subject)
        ) WITH (fillfactor = 80);  -- room for the next version on the same page
    END IF;
END $$;
