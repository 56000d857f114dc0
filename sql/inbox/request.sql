-- Why: a client that got no answer asks again, with the same idempotency key. The first request is carried out, and its
-- response kept here, in the same transaction; those that come again get it.
--
-- scope is the inbox's name, so that two services may share the table. response_kind says what response was: bytes, text
-- or json; NULL before there is one.
--
-- Run in the service's database. Safe to run again.
-- Services need: GRANT SELECT, INSERT, UPDATE ON public.inbox_request TO ...; to prune, DELETE besides.

DO $$ BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('public.inbox', 0));
    IF to_regclass('public.inbox_request') IS NULL THEN
        CREATE TABLE public.inbox_request (
            scope         text        NOT NULL,
            key           text        NOT NULL,
            request_hash  text        NOT NULL,
            response_kind text,
            response      bytea,
            changed_at    timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (scope, key)
        );
        CREATE INDEX ON public.inbox_request USING brin (changed_at);
    END IF;
END $$;
