-- Why: which rows of the outbox have been published? The relay writes nothing per event, and the log's positions say
-- nothing about rows. So it takes now and then a snapshot and where the log ends just after it. Once that LSN is
-- confirmed, every transaction that had ended in the snapshot is settled, and the snapshot is noted here.
--
-- But settled is only what came: a table may have been out of the publication, filtered, renamed, unlogged. So each
-- note says of which heaps (the outbox, or its partitions) every row was sent, and since when without a break. The
-- relay reads that in the statement that takes the snapshot: a fingerprint of what the publication sends of each heap,
-- made of things that never return to what they were once they have changed (cdc_outbox/journal/coverage.py). A row is
-- published if its transaction began after `since` and had ended in the snapshot.
--
-- Only what is certain counts as known:
--   * A snapshot does not list subtransactions in progress. So only transactions older than the oldest one in progress
--     count: a transaction that writes for an hour keeps what came after its start pending for that hour.
--   * An update gives a row another transaction. Where a heap may hold rows that were never sent (it was not empty when
--     `since` began), an update could pass one of them for published. There, PostgreSQL's count of updates belongs to
--     the fingerprint, and `earlier` counts instead of `snapshot`: a session may report what it has updated ten seconds
--     late, or after the transaction that it has begun since. A file that was filled elsewhere and put in the
--     table's place (pg_repack) could do the same: only the file that the relay has seen counts. Where a heap was empty (`complete`), all that
--     is in it was sent, updated, moved or not.
--   * Transaction ids are a server's own. A note from another one (restored from a dump, cloned) says nothing here.
--   * A row's xid has 32 bits. A row that lies there for 2^31 transactions becomes unknown. (After 2^32 it would look
--     young again; a row from before the slot that lies there so long could pass for a settled one.)
--   * A transaction that changes the publication may be decoded before any snapshot shows it (its COMMIT waits for a
--     synchronous standby). So `snapshot` is one of which all that was in progress had ended when the fingerprint was
--     read.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.settled (
    id                bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot              text        NOT NULL,
    system_identifier text        NOT NULL,
    snapshot          pg_snapshot NOT NULL,
    earlier           pg_snapshot,
    lsn               pg_lsn      NOT NULL,
    coverage          uuid        NOT NULL,
    taken_at          timestamptz NOT NULL,
    settled_at        timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX IF NOT EXISTS settled_xmin ON cdc_outbox.settled (slot, pg_snapshot_xmin(snapshot));
CREATE INDEX IF NOT EXISTS settled_earlier ON cdc_outbox.settled (slot, pg_snapshot_xmin(earlier));
CREATE INDEX IF NOT EXISTS settled_coverage ON cdc_outbox.settled (coverage);

COMMENT ON TABLE cdc_outbox.settled IS
    'Notes of the relay: every transaction that had ended in snapshot is settled, as far as coverage goes';
COMMENT ON COLUMN cdc_outbox.settled.earlier IS 'A snapshot taken a while before, for heaps in which updates count';
COMMENT ON COLUMN cdc_outbox.settled.lsn IS 'The end of the log just after the catalogue was looked at; settled by now';

CREATE TABLE IF NOT EXISTS cdc_outbox.coverage (
    id          uuid,
    heap        oid,
    since       pg_snapshot NOT NULL,
    complete    boolean     NOT NULL,
    fingerprint text        NOT NULL,
    updates     text,
    file        oid         NOT NULL,
    PRIMARY KEY (id, heap)
);

COMMENT ON TABLE cdc_outbox.coverage IS 'Of which heaps every row is sent: what notes with this coverage speak of';
COMMENT ON COLUMN cdc_outbox.coverage.since IS 'What began after this snapshot, and only that, is known to be sent';
COMMENT ON COLUMN cdc_outbox.coverage.complete IS 'The heap was empty then: it holds nothing that was never sent';
COMMENT ON COLUMN cdc_outbox.coverage.file IS 'Its relfilenode';
COMMENT ON COLUMN cdc_outbox.coverage.updates IS 'How many updates PostgreSQL had counted, and since when it counts';

CREATE OR REPLACE FUNCTION cdc_outbox.full_xid(row_xid xid) RETURNS xid8
LANGUAGE sql STABLE PARALLEL SAFE
-- The one that ends in these 32 bits and is not 2^31 or more away from the next one to be given. Without a subquery, so
-- that the planner can put it in place of the call.
RETURN ((pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 2147483648)
        - ((pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 2147483648 - row_xid::text::bigint) & 4294967295)
       )::text::xid8;

COMMENT ON FUNCTION cdc_outbox.full_xid(xid) IS 'The 64 bits of a row''s xmin';
