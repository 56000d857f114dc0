-- Why: an event that can never be published (too large, refused by the broker for good, a topic that data must not name,
-- no aggregate id, a row that cannot be read) must neither stop everything behind it nor vanish. With
-- relay.on_poison = "dead-letter" it is kept here, whole, and only that settles it.
--
-- A row in redrive_request asks the running relay to publish a dead letter again. It reaches the relay through the log,
-- in commit order with everything else, so the table belongs to the publication. It names the slot: of several relays
-- the others pass it over. What came of it is a row of the relay's own in redrive_outcome: while the COMMIT of a request
-- waits for a synchronous standby the request has come through the log already, and no other session sees what else its
-- transaction wrote, or can change a row that it has changed. Rows of both may be deleted at any time.
--
-- Run as: the owner of schema cdc_outbox and of the publication. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.dead_letter (
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
    -- why it is here
    reason            text        NOT NULL,
    detail            text        NOT NULL,
    attempts          integer     NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL DEFAULT now(),
    -- what became of it; an open one with a request that has no outcome yet is shown as redriving
    state             text        NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'redriven', 'discarded')),
    state_changed_at  timestamptz NOT NULL DEFAULT now(),
    state_changed_by  text        NOT NULL DEFAULT current_user,
    note              text,
    UNIQUE (system_identifier, slot, commit_lsn, ordinal)
);

CREATE INDEX IF NOT EXISTS dead_letter_waiting ON cdc_outbox.dead_letter (id) WHERE state = 'open';

COMMENT ON TABLE cdc_outbox.dead_letter IS
    'Events that could not be published. See them with `cdc-outbox dead-letters list`';
COMMENT ON COLUMN cdc_outbox.dead_letter.headers IS 'The Kafka headers: an array of [name, value], in order';
COMMENT ON COLUMN cdc_outbox.dead_letter.payload IS
    'The bytes Kafka would have got; of a row that could not be read, the whole Insert message of pgoutput';
COMMENT ON COLUMN cdc_outbox.dead_letter.reason IS 'One word to filter by; detail is the sentence';
COMMENT ON COLUMN cdc_outbox.dead_letter.attempts IS '1, and one more for every redrive that was refused';
COMMENT ON COLUMN cdc_outbox.dead_letter.note IS 'Why it was discarded';

CREATE TABLE IF NOT EXISTS cdc_outbox.redrive_request (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot           text        NOT NULL,
    dead_letter_id bigint      NOT NULL,
    topic          text,
    key            text,
    requested_by   text        NOT NULL DEFAULT current_user,
    requested_at   timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.redrive_request IS
    'Asks the relay of slot to publish a dead letter again; topic and key replace the dead letter''s own';

CREATE INDEX IF NOT EXISTS redrive_request_of ON cdc_outbox.redrive_request (dead_letter_id);

CREATE TABLE IF NOT EXISTS cdc_outbox.redrive_outcome (
    request_id     bigint      PRIMARY KEY,
    dead_letter_id bigint      NOT NULL,
    outcome        text        NOT NULL CHECK (outcome IN ('redriven', 'refused', 'passed over')),
    at             timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.redrive_outcome IS 'What came of each request in redrive_request; the relay writes it';

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_publication WHERE pubname = 'cdc_outbox' AND NOT puballtables)
       AND NOT EXISTS (SELECT FROM pg_publication_tables
                        WHERE pubname = 'cdc_outbox' AND schemaname = 'cdc_outbox' AND tablename = 'redrive_request')
    THEN
        ALTER PUBLICATION cdc_outbox ADD TABLE cdc_outbox.redrive_request;
    END IF;
END $$;
