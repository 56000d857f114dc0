-- Why: which rows of the outbox have been published? The relay writes nothing per event, and the log's positions say
-- nothing about rows. So it takes now and then a snapshot and where the log ends just after it. Once that LSN is
-- confirmed, every transaction that had ended in the snapshot is settled (delivered, or kept as a dead letter), and the
-- snapshot is noted here.
--
-- Known is what cannot be otherwise, nothing more:
--   * A snapshot does not list subtransactions in progress. So only transactions older than the oldest one in progress
--     count: a transaction that writes for an hour keeps what came after its start unknown for that hour.
--   * What had ended when the slot began was never sent through it. `since` is a snapshot taken then.
--   * Transaction ids are a server's own. A note from another one (restored from a dump, cloned) says nothing here.
--   * A row's xid has 32 bits. A row that lies there for 2^31 transactions becomes unknown. (After 2^32 it would look
--     young again; a row from before the slot that lies there so long could pass for a settled one.)
-- A row that the application updates counts from its update.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.settled (
    slot              text        NOT NULL,
    system_identifier text        NOT NULL,
    snapshot          pg_snapshot NOT NULL,
    lsn               pg_lsn      NOT NULL,
    since             pg_snapshot NOT NULL,
    taken_at          timestamptz NOT NULL,
    settled_at        timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX IF NOT EXISTS settled_xmin ON cdc_outbox.settled (slot, pg_snapshot_xmin(snapshot));

COMMENT ON TABLE cdc_outbox.settled IS
    'Notes of the relay: everything that had ended in snapshot, and not yet in since, is settled';
COMMENT ON COLUMN cdc_outbox.settled.lsn IS 'The end of the log just after the snapshot was taken; confirmed by now';
COMMENT ON COLUMN cdc_outbox.settled.since IS 'What had ended in this one never came through the slot';

CREATE OR REPLACE FUNCTION cdc_outbox.full_xid(row_xid xid) RETURNS xid8
LANGUAGE sql STABLE PARALLEL SAFE
-- The one that ends in these 32 bits and is not 2^31 or more away from the next one to be given. Without a subquery, so
-- that the planner can put it in place of the call.
RETURN ((pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 2147483648)
        - ((pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 2147483648 - row_xid::text::bigint) & 4294967295)
       )::text::xid8;

COMMENT ON FUNCTION cdc_outbox.full_xid(xid) IS 'The 64 bits of a row''s xmin';

CREATE INDEX IF NOT EXISTS dead_letter_event ON cdc_outbox.dead_letter (event_id);

-- The view belongs to one outbox and one slot; `cdc-outbox migrate up` makes it for those of its configuration.
CREATE OR REPLACE PROCEDURE cdc_outbox.make_event_status(
    outbox text, slot text, id text, aggregate_id text, event_type text)
LANGUAGE plpgsql AS $$
BEGIN
    DROP VIEW IF EXISTS cdc_outbox.event_status;
    EXECUTE format($view$
        CREATE VIEW cdc_outbox.event_status AS
        SELECT event.%2$I AS outbox_id, event.%3$I AS aggregate_id, event.%4$I AS event_type,
               CASE WHEN letter.state IS NULL THEN note.settled_at IS NOT NULL ELSE letter.state = 'redriven' END
                   AS published,
               CASE WHEN letter.state IS NULL THEN (note.settled_at IS NOT NULL)::int
                    ELSE letter.attempts + (letter.state = 'redriven')::int END AS publish_attempts,
               CASE WHEN letter.state IS NULL THEN note.settled_at
                    WHEN letter.state = 'redriven' THEN letter.state_changed_at END AS processed_at
          FROM %1$s AS event
          -- the first note that covers the row, unless it came before the slot
          LEFT JOIN LATERAL (SELECT since, settled_at FROM cdc_outbox.settled
                              WHERE slot = %5$L AND pg_snapshot_xmin(snapshot) > cdc_outbox.full_xid(event.xmin)
                                AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
                              ORDER BY pg_snapshot_xmin(snapshot), settled_at LIMIT 1) AS note
            ON NOT pg_visible_in_snapshot(cdc_outbox.full_xid(event.xmin), note.since)
          LEFT JOIN LATERAL (SELECT state, attempts, state_changed_at FROM cdc_outbox.dead_letter
                              WHERE event_id = event.%2$I::text AND slot = %5$L ORDER BY id DESC LIMIT 1) AS letter
            ON true
        $view$, outbox, id, aggregate_id, event_type, slot);
    EXECUTE format('COMMENT ON VIEW cdc_outbox.event_status IS %L',
                   format('Which events are known to be published: %s (%s, %s, %s) through slot %s',
                          outbox, id, aggregate_id, event_type, slot));
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        GRANT SELECT ON cdc_outbox.event_status TO cdc_outbox_reader;
    END IF;
END $$;

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_relay') THEN
        GRANT USAGE ON SCHEMA cdc_outbox TO cdc_outbox_relay;
        GRANT SELECT, INSERT, DELETE ON cdc_outbox.settled TO cdc_outbox_relay;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdc_outbox_reader') THEN
        GRANT SELECT ON cdc_outbox.settled TO cdc_outbox_reader;
    END IF;
END $$;
