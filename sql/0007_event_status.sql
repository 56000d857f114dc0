-- Why: an application, or whoever watches it, wants to ask which rows of the outbox are published. View
-- cdc_outbox.event_status says of each row, as far as the notes of 0006 go:
--
--   pending    will come, or has come and it is not certain yet
--   published  Kafka has acknowledged it
--   unknown    it cannot be told
--   dead       it is a dead letter, and somebody must decide about it
--   discarded  it was one, and nothing more is to be done about it
--   denied     the policy keeps it inside
--
-- The view reads a function, and PostgreSQL reads the function's text when the view is queried. So you can ALTER,
-- RENAME or DROP the outbox without dropping the view first. The planner puts that text in the function's place: an
-- index on the outbox's id serves the view, too. After such a change `cdc-outbox migrate up` makes the view again;
-- until then it may fail.
--
-- The view runs with the rights and the search_path of whoever queries it: row security of the outbox applies, and all
-- names are qualified. GRANT cdc_outbox_reader TO those who may query it; roles.sql gives it the rights that this
-- takes.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.outbox (
    slot         text     PRIMARY KEY,
    outbox       regclass NOT NULL,
    id           text     NOT NULL,
    aggregate_id text     NOT NULL,
    event_type   text     NOT NULL
);

COMMENT ON TABLE cdc_outbox.outbox IS 'The outboxes of this database, and their columns, by the slot that serves each';

-- What event_status reads, and its columns, as the outboxes are now; NULL if none is entered. Of one outbox its columns
-- keep their types; of several, whose types may differ, all are text. With this search_path names come out qualified.
CREATE OR REPLACE FUNCTION cdc_outbox.event_status_now(OUT body text, OUT columns text)
LANGUAGE sql STABLE SET search_path = pg_catalog AS $$
    WITH entered AS (
        SELECT outbox.*, count(*) OVER () > 1 AS are_several, format_type(of_id.atttypid, -1) AS type_of_id,
               format_type(of_aggregate.atttypid, -1) AS type_of_aggregate,
               format_type(of_type.atttypid, -1) AS type_of_type
          FROM cdc_outbox.outbox  -- it, or a column, may have been dropped
          JOIN pg_attribute AS of_id ON of_id.attrelid = outbox.outbox AND of_id.attname = outbox.id
          JOIN pg_attribute AS of_aggregate
            ON of_aggregate.attrelid = outbox.outbox AND of_aggregate.attname = outbox.aggregate_id
          JOIN pg_attribute AS of_type ON of_type.attrelid = outbox.outbox AND of_type.attname = outbox.event_type),
    shown AS (
        SELECT slot, outbox, id, aggregate_id, event_type, are_several,
               CASE WHEN are_several THEN 'text' ELSE type_of_id END AS type_of_id,
               CASE WHEN are_several THEN 'text' ELSE type_of_aggregate END AS type_of_aggregate,
               CASE WHEN are_several THEN 'text' ELSE type_of_type END AS type_of_type
          FROM entered)
    SELECT '-- types: ' || md5(min(type_of_id) || ' ' || min(type_of_aggregate) || ' ' || min(type_of_type)) || string_agg(format($rows$
        SELECT event.%2$I%6$s AS outbox_id, event.%3$I%6$s AS aggregate_id, event.%4$I%6$s AS event_type,
               stands.state = 'published' AS published,
               coalesce(letter.attempts, 0) + (stands.state = 'published')::int AS publish_attempts,
               CASE WHEN stands.state = 'published'
                    THEN greatest(coalesce(by_first.settled_at, by_later.settled_at), letter.state_changed_at) END
                   AS processed_at,
               %5$L AS slot, stands.state
          FROM %1$s AS event
          -- the first note in which the row's transaction had ended; where updates count, the first that was sure of it
          LEFT JOIN LATERAL (SELECT coverage, settled_at FROM cdc_outbox.settled
                              WHERE slot = %5$L AND pg_catalog.pg_snapshot_xmin(snapshot) > cdc_outbox.full_xid(event.xmin)
                                AND system_identifier = (SELECT system_identifier::text FROM pg_catalog.pg_control_system())
                              ORDER BY pg_catalog.pg_snapshot_xmin(snapshot), settled_at LIMIT 1) AS first ON true
          LEFT JOIN LATERAL (SELECT first.settled_at FROM cdc_outbox.coverage
                              WHERE id = first.coverage AND heap = event.tableoid AND complete
                                AND cdc_outbox.full_xid(event.xmin) >= pg_catalog.pg_snapshot_xmax(since)) AS by_first ON true
          LEFT JOIN LATERAL (SELECT coverage, settled_at FROM cdc_outbox.settled
                              WHERE slot = %5$L AND pg_catalog.pg_snapshot_xmin(earlier) > cdc_outbox.full_xid(event.xmin)
                                AND system_identifier = (SELECT system_identifier::text FROM pg_catalog.pg_control_system())
                                AND by_first.settled_at IS NULL
                              ORDER BY pg_catalog.pg_snapshot_xmin(earlier), settled_at LIMIT 1) AS later ON true
          LEFT JOIN LATERAL (SELECT later.settled_at FROM cdc_outbox.coverage
                              WHERE id = later.coverage AND heap = event.tableoid
                                AND (complete OR file = pg_catalog.pg_relation_filenode(event.tableoid))
                                AND cdc_outbox.full_xid(event.xmin) >= pg_catalog.pg_snapshot_xmax(since)) AS by_later ON true
          LEFT JOIN cdc_outbox.coverage AS latest
            ON latest.heap = event.tableoid AND cdc_outbox.full_xid(event.xmin) >= pg_catalog.pg_snapshot_xmax(latest.since)
           AND cdc_outbox.full_xid(event.xmin) < pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())
           AND latest.id = (SELECT coverage FROM cdc_outbox.settled
                             WHERE slot = %5$L
                               AND system_identifier = (SELECT system_identifier::text FROM pg_catalog.pg_control_system())
                             ORDER BY pg_catalog.pg_snapshot_xmax(snapshot) DESC, id DESC LIMIT 1)
          LEFT JOIN LATERAL (SELECT state, attempts, state_changed_at FROM cdc_outbox.parked
                              WHERE event_id = pg_catalog.format('%%s', event.%2$I) AND slot = %5$L
                              ORDER BY id DESC LIMIT 1) AS letter
            ON true
         CROSS JOIN LATERAL (
               SELECT CASE WHEN letter.state IN ('discarded', 'dead', 'denied') THEN letter.state
                           WHEN event.%2$I IS NULL THEN 'unknown'  -- it may be a dead letter: who could tell?
                           WHEN by_first.settled_at IS NOT NULL OR by_later.settled_at IS NOT NULL THEN 'published'
                           WHEN latest.since IS NOT NULL THEN 'pending'
                           ELSE 'unknown' END AS state) AS stands
        $rows$, outbox, id, aggregate_id, event_type, slot, CASE WHEN are_several THEN '::text' ELSE '' END),
                      ' UNION ALL ' ORDER BY slot),
           format('outbox_id %s, aggregate_id %s, event_type %s, published boolean, publish_attempts integer, '
                  'processed_at timestamptz, slot text, state text',
                  min(type_of_id), min(type_of_aggregate), min(type_of_type))
      FROM shown
$$;

CREATE OR REPLACE PROCEDURE cdc_outbox.make_event_status()
LANGUAGE plpgsql AS $$
DECLARE
    now  record := cdc_outbox.event_status_now();
    make text := format('CREATE OR REPLACE FUNCTION cdc_outbox.event_status_rows() RETURNS TABLE (%s) '
                        'LANGUAGE sql STABLE PARALLEL SAFE AS %L', now.columns, now.body);
BEGIN
    IF now.body IS NULL THEN
        DROP VIEW IF EXISTS cdc_outbox.event_status;
        DROP FUNCTION IF EXISTS cdc_outbox.event_status_rows();
        RETURN;
    END IF;
    BEGIN
        EXECUTE make;  -- rights to the view stay
    EXCEPTION WHEN invalid_function_definition THEN  -- a column is of another type
        DROP VIEW IF EXISTS cdc_outbox.event_status;
        DROP FUNCTION cdc_outbox.event_status_rows();
        EXECUTE make;
    END;
    COMMENT ON FUNCTION cdc_outbox.event_status_rows() IS 'What event_status shows';
    CREATE OR REPLACE VIEW cdc_outbox.event_status AS SELECT * FROM cdc_outbox.event_status_rows();
    COMMENT ON VIEW cdc_outbox.event_status IS
        'What became of each row: pending (will come), published, unknown (cannot be told), dead, discarded, denied';
END $$;

COMMENT ON PROCEDURE cdc_outbox.make_event_status() IS 'Makes view event_status for the outboxes that are entered';
