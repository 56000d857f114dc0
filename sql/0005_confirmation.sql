-- Why: a slot that was dropped and created again begins where it was made. What was committed before is not in it, and
-- nothing in the replication protocol tells. The relay notes here up to where it may confirm, and what the server had
-- counted for the slot by then, and compares before it streams (cdc_outbox/journal/continuity.py).
--
-- A crash of the server puts the slot back to its last checkpoint. The relay then starts reading at confirmed_lsn,
-- never at limit_lsn. To accept a gap that the relay complains of, or to read again from where the slot stands, delete
-- the slot's row.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.confirmation (
    slot                 text        PRIMARY KEY,
    system_identifier    text        NOT NULL,
    confirmed_lsn        pg_lsn      NOT NULL,
    limit_lsn            pg_lsn      NOT NULL,
    decoded_transactions bigint      NOT NULL,
    counted_since        text        NOT NULL,
    noted_at             timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.confirmation IS 'By this a relay notices that its slot is not the one it confirmed to';
COMMENT ON COLUMN cdc_outbox.confirmation.confirmed_lsn IS 'Confirmed when this was noted; the slot may be ahead of it';
COMMENT ON COLUMN cdc_outbox.confirmation.limit_lsn IS 'No relay confirms beyond this without raising it first';
COMMENT ON COLUMN cdc_outbox.confirmation.decoded_transactions IS 'total_txns of pg_stat_replication_slots';
COMMENT ON COLUMN cdc_outbox.confirmation.counted_since IS 'If this differs, that counter was reset for another reason';
