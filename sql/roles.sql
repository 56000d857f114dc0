-- Why: the relay should run with the least it needs, and whoever watches it with less. All rights to schema cdc_outbox
-- are given here and nowhere else, so that whatever ran before, and in whatever order, these are the rights afterwards.
-- (What another role than the owner has granted, only that role can take back.)
--
--   cdc_outbox_relay   logs in and streams. It needs no SELECT on the outbox and gets none. Be aware what REPLICATION
--                      means in PostgreSQL: it may stream any table through any publication, and drop any slot.
--   cdc_outbox_policy_admin  cannot log in; GRANT it to whoever may activate a policy.
--   cdc_outbox_reader  cannot log in; GRANT it to whoever may read the relay's state: not the events, so of
--                      parked ones everything but payload, key and headers, and of the outbox what event_status shows.
--
-- Roles belong to the whole server. One that exists already keeps its attributes and its password. Where this
-- database's administrator may not create a role with REPLICATION (managed services), a warning says so: make the role
-- the provider's way (for example GRANT rds_replication), or let the relay connect as a role of yours to which you
-- GRANT cdc_outbox_relay. cdc_outbox_relay has no password, so it cannot log in with one until you set it:
--     ALTER ROLE cdc_outbox_relay PASSWORD '...';   -- or a certificate, or peer
--
-- Run as: the owner of schema cdc_outbox; to make the roles, with CREATEROLE and the right to grant REPLICATION. It
-- comes after all other files, `cdc-outbox migrate up` runs it each time, and it is safe to run again: do so after you
-- made a role by hand.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        CREATE ROLE cdc_outbox_reader NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_policy_admin') THEN
        CREATE ROLE cdc_outbox_policy_admin NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_relay') THEN
        CREATE ROLE cdc_outbox_relay LOGIN REPLICATION;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE WARNING 'roles of cdc-outbox were not created: %', SQLERRM
            USING HINT = 'Let an administrator run sql/roles.sql, or use roles of your own.';
    WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this server is being migrated at this very moment
END $$;

DO $$
DECLARE
    named text;
    default_owner name;
    entered record;
BEGIN
    REVOKE ALL ON ALL TABLES IN SCHEMA cdc_outbox FROM PUBLIC;
    FOREACH named IN ARRAY ARRAY['cdc_outbox_relay', 'cdc_outbox_policy_admin', 'cdc_outbox_reader'] LOOP
        CONTINUE WHEN NOT EXISTS (SELECT FROM pg_roles WHERE rolname = named);
        EXECUTE format('REVOKE ALL ON SCHEMA cdc_outbox FROM %I', named);
        EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA cdc_outbox FROM %I', named);
        EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA cdc_outbox FROM %I', named);
        FOR default_owner IN
            SELECT pg_get_userbyid(defaclrole) FROM pg_default_acl, aclexplode(defaclacl) AS entry
             WHERE defaclnamespace = 'cdc_outbox'::regnamespace AND defaclobjtype = 'r'
               AND pg_get_userbyid(entry.grantee) = named
        LOOP
            BEGIN
                EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA cdc_outbox REVOKE ALL ON TABLES FROM %I',
                               default_owner, named);
            EXCEPTION WHEN insufficient_privilege THEN
                RAISE WARNING 'tables that % makes in schema cdc_outbox would be %''s to read', default_owner, named
                    USING HINT = 'Let that role, or a superuser, run sql/roles.sql.';
            END;
        END LOOP;
        EXECUTE format('GRANT USAGE ON SCHEMA cdc_outbox TO %I', named);
    END LOOP;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_relay') THEN
        GRANT SELECT, INSERT, UPDATE ON cdc_outbox.confirmation, cdc_outbox.parked TO cdc_outbox_relay;
        GRANT SELECT, INSERT ON cdc_outbox.outcome, cdc_outbox.policy TO cdc_outbox_relay;
        GRANT SELECT, INSERT, DELETE ON cdc_outbox.settled, cdc_outbox.coverage, cdc_outbox.canary TO cdc_outbox_relay;
    END IF;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_policy_admin') THEN
        GRANT INSERT (slot, kind, body, reason), SELECT (id, slot, kind, parked_id, topic, reason, principal, at)
            ON cdc_outbox.request TO cdc_outbox_policy_admin;
        GRANT SELECT ON cdc_outbox.policy, cdc_outbox.outcome TO cdc_outbox_policy_admin;
    END IF;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        GRANT SELECT ON cdc_outbox.schema_migration, cdc_outbox.confirmation, cdc_outbox.settled, cdc_outbox.coverage,
                        cdc_outbox.outbox, cdc_outbox.outcome, cdc_outbox.policy, cdc_outbox.canary
            TO cdc_outbox_reader;
        -- it may name a key in place of the event's
        GRANT SELECT (id, slot, kind, parked_id, topic, reason, principal, at) ON cdc_outbox.request TO cdc_outbox_reader;
        GRANT SELECT (id, system_identifier, slot, commit_lsn, ordinal, committed_at, event_id, aggregate_type,
                      aggregate_id, event_type, topic, event_sha256, rule, rule_sha256, policy_sha256, reason, detail,
                      attempts, created_at, state, state_changed_at, state_changed_by, note)
            ON cdc_outbox.parked TO cdc_outbox_reader;
        IF to_regclass('cdc_outbox.event_status') IS NOT NULL THEN
            GRANT SELECT ON cdc_outbox.event_status TO cdc_outbox_reader;
            GRANT EXECUTE ON FUNCTION cdc_outbox.event_status_rows(), cdc_outbox.full_xid(xid) TO cdc_outbox_reader;
        END IF;
        -- What event_status reads of each outbox, and of none that is no longer entered: nothing else here grants xmin.
        FOR entered IN SELECT DISTINCT pg_class.oid::regclass AS outbox
                         FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND attname = 'xmin',
                              aclexplode(attacl) JOIN pg_roles ON pg_roles.oid = grantee
                        WHERE relnamespace <> 'cdc_outbox'::regnamespace AND rolname = 'cdc_outbox_reader'
                          AND pg_has_role(relowner, 'USAGE')
        LOOP
            BEGIN
                EXECUTE format('REVOKE ALL ON %s FROM cdc_outbox_reader', entered.outbox);
            EXCEPTION WHEN dependent_objects_still_exist THEN
                RAISE WARNING 'cdc_outbox_reader has passed rights to % on: they stay', entered.outbox;
            END;
        END LOOP;
        FOR entered IN SELECT outbox, id, aggregate_id, event_type, relnamespace::regnamespace AS space,
                              relrowsecurity AND NOT EXISTS (SELECT FROM pg_policies
                                  WHERE (schemaname, tablename) = (relnamespace::regnamespace::name, relname)
                                    AND permissive = 'PERMISSIVE' AND cmd IN ('SELECT', 'ALL')
                                    AND roles && '{public,cdc_outbox_reader}') AS hides_rows
                         FROM cdc_outbox.outbox JOIN pg_class ON pg_class.oid = outbox.outbox
        LOOP
            BEGIN
                IF NOT has_schema_privilege('cdc_outbox_reader', entered.space, 'USAGE') THEN
                    EXECUTE format('GRANT USAGE ON SCHEMA %s TO cdc_outbox_reader', entered.space);
                END IF;
                EXECUTE format('GRANT SELECT (%I, %I, %I, xmin, tableoid) ON %s TO cdc_outbox_reader',
                               entered.id, entered.aggregate_id, entered.event_type, entered.outbox);
                IF entered.hides_rows THEN
                    RAISE WARNING 'row security may hide rows of % from who reads cdc_outbox.event_status', entered.outbox
                        USING HINT = format('CREATE POLICY ... ON %s FOR SELECT TO cdc_outbox_reader USING (true)',
                                            entered.outbox);
                END IF;
            EXCEPTION
                WHEN insufficient_privilege THEN
                    RAISE WARNING 'cdc_outbox_reader may not read what event_status shows of %', entered.outbox
                        USING HINT = 'Let the owner of that table and its schema, or a superuser, run sql/roles.sql.';
                WHEN undefined_column THEN
                    NULL;  -- `cdc-outbox migrate up` says so
            END;
        END LOOP;
    END IF;
END $$;
