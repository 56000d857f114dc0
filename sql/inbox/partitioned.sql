-- Why: where messages are many, dropping a day is cheaper than deleting its rows. As plain.sql, but for the key.
--
-- A key must hold what a table is partitioned by. committed_at is the time of the transaction that wrote the event, which
-- the relay puts on every copy of it alike; so the key is as exact as without. That needs a topic with
-- message.timestamp.type = CreateTime (the default). Of a redriven event it is the time of the redrive.
--
-- Makes the partitions of yesterday, today and the next 14 days, in UTC, each time it is run: run it daily. It is made
-- beside the table and attached then, so that consumers do not wait; those that write to the default partition, where
-- everything goes that belongs to no other, wait while it is searched. A day of which it holds rows already gets none of
-- its own.
--
-- Run in the consumer's database, as a role that may CREATE in schema public. Safe to run again.
-- Consumers need: GRANT SELECT, INSERT ON public.inbox TO ...; to prune, ownership.

DO $$
DECLARE
    parent regclass;
    space  name;
    prefix name;
    day    date;
    made   text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('public.inbox', 0));
    IF to_regclass('public.inbox') IS NULL THEN
        CREATE TABLE public.inbox (
            consumer     text        NOT NULL,
            source       text        NOT NULL DEFAULT '',
            message_id   text        NOT NULL,
            committed_at timestamptz NOT NULL,
            processed_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (consumer, source, message_id, committed_at)
        ) PARTITION BY RANGE (committed_at);
        CREATE INDEX ON public.inbox USING brin (processed_at);
    END IF;
    SELECT pg_class.oid, nspname, relname INTO STRICT parent, space, prefix
      FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace WHERE pg_class.oid = to_regclass('public.inbox');
    IF octet_length(prefix) > 54 THEN
        RAISE EXCEPTION 'table name % is too long: its partitions are named after it, and a day', prefix
              USING ERRCODE = 'name_too_long';
    END IF;
    SET LOCAL lock_timeout = '80ms';
    FOR day IN SELECT NULL::date UNION ALL  -- the default one
               SELECT (now() AT TIME ZONE 'UTC')::date + days FROM generate_series(-1, 14) AS days
    LOOP
        made := format('%I.%I', space, prefix || COALESCE(to_char(day, '"_"YYYYMMDD'), '_default'));
        CONTINUE WHEN to_regclass(made) IS NOT NULL;
        BEGIN
            EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL)', made, parent);
            EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s ', parent, made)
                 || CASE WHEN day IS NULL THEN 'DEFAULT'
                         ELSE format('FOR VALUES FROM (%L) TO (%L)', day || ' 00:00+00', day + 1 || ' 00:00+00') END;
        EXCEPTION
            WHEN check_violation THEN
                RAISE NOTICE 'no partition for %: the default one holds rows of that day', day;
            WHEN lock_not_available THEN
                RAISE NOTICE 'no partition for %: the default one is being written to; run this again', day;
        END;
    END LOOP;
END $$;
