-- cdc-outbox: only if outbox.table = public.outbox and postgres.publication = cdc_outbox
--
-- Why: a publication tells PostgreSQL which changes to send: the outbox, and the two tables of ours whose rows the
-- relay has to hear of. Inserts only: then clean-up costs the relay nothing, and the outbox needs no replica identity.
-- Should the outbox be partitioned, its rows come under its own name.
--
-- The publication must be older than the slot: make it first, as `cdc-outbox migrate up` does.
-- A slot that is older fails on PostgreSQL 15 to 17, and silently sends nothing on 18.
--
-- Run as: the owner of these tables, with CREATE on this database. Safe to run again.

DO $$
DECLARE
    missing text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'cdc_outbox') THEN
        CREATE PUBLICATION cdc_outbox FOR TABLE public.outbox, cdc_outbox.request, cdc_outbox.canary
            WITH (publish = 'insert', publish_via_partition_root);
        RETURN;
    END IF;
    FOREACH missing IN ARRAY ARRAY['request', 'canary'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_publication_tables
                               WHERE pubname = 'cdc_outbox' AND schemaname = 'cdc_outbox' AND tablename = missing);
        EXECUTE format('ALTER PUBLICATION cdc_outbox ADD TABLE cdc_outbox.%I', missing);
    END LOOP;
END $$;
