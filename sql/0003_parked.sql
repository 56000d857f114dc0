-- Why: not every event can go to Kafka at once. One that can never be published (too large, refused by the broker for
-- good, a topic that data must not name, no aggregate id, a row that cannot be read) must neither stop everything
-- behind it nor vanish. It is parked: kept here, whole, and only that settles it. With relay.on_poison = "dead-letter"
-- such events are dead letters. What the policy denies is kept here, too: somebody may ask what it was.
--
--   dead       somebody must decide about it: cdc-outbox dead-letters redrive|discard
--   redriven   it was published again, and Kafka has acknowledged it
--   discarded  somebody has decided that nothing is to be done about it; note says why
--   denied     the policy has decided that it stays inside
--
-- Its identity is unique: an event that the log brings once more is not parked twice.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.parked (
    id                bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- the event's identity: which one of which transaction, on which server, read through which slot
    system_identifier text        NOT NULL,
    slot              text        NOT NULL,
    commit_lsn        pg_lsn      NOT NULL,
    ordinal           integer     NOT NULL,
    committed_at      timestamptz NOT NULL,
    -- the event; NULL where the row has nothing, or could not be read
    event_id          text,
    aggregate_type    text,
    aggregate_id      text,
    event_type        text,
    topic             text,
    key               bytea,
    headers           json,
    payload           bytea,
    -- SHA-256 over what Kafka would have got, each part with its length before it; NULL for a dead letter
    event_sha256      bytea,
    -- what decided, of a denied one: NULL for a dead letter, an empty rule for the policy's default
    rule              text,
    rule_sha256       bytea,
    policy_sha256     bytea,
    -- why it is here
    reason            text        NOT NULL,
    detail            text        NOT NULL,
    attempts          integer     NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL DEFAULT now(),
    -- what became of it
    state             text        NOT NULL CHECK (state IN ('dead', 'redriven', 'discarded', 'denied')),
    state_changed_at  timestamptz NOT NULL DEFAULT now(),
    state_changed_by  text        NOT NULL DEFAULT current_user,
    note              text,
    UNIQUE (system_identifier, slot, commit_lsn, ordinal)
);

CREATE INDEX IF NOT EXISTS parked_dead ON cdc_outbox.parked (id) WHERE state = 'dead';
CREATE INDEX IF NOT EXISTS parked_denied ON cdc_outbox.parked (id) WHERE state = 'denied';
-- by its hash: an id may be of any length
CREATE INDEX IF NOT EXISTS parked_event ON cdc_outbox.parked USING hash (event_id);

COMMENT ON TABLE cdc_outbox.parked IS
    'Events that are kept here instead of being published. See `cdc-outbox dead-letters list` and `holds list`';
COMMENT ON COLUMN cdc_outbox.parked.headers IS 'The Kafka headers: an array of [name, value], in order';
COMMENT ON COLUMN cdc_outbox.parked.payload IS
    'The bytes Kafka would have got; of a row that could not be read, the whole Insert message of pgoutput.'
    ' NULL, too, if the rule that denied it says keep = "hash"';
COMMENT ON COLUMN cdc_outbox.parked.reason IS 'One word to filter by; detail is the sentence';
COMMENT ON COLUMN cdc_outbox.parked.attempts IS '1, and one more for every redrive that was refused';
COMMENT ON COLUMN cdc_outbox.parked.note IS 'Why it was discarded';
