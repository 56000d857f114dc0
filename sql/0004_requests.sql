-- Why: an operator asks the running relay for something by a row in this table, and nothing else: cdc-outbox
-- dead-letters redrive, policy activate. The row comes to the relay through the log, in commit order with everything
-- else, so the table belongs to the publication. It names the slot: relays of other slots pass it over.
--
-- A request's row carries all that is needed to act on it. While its COMMIT waits for a synchronous standby it has come
-- through the log already, and no other session sees what else its transaction wrote, or can change a row that it has
-- changed. What came of it is therefore a row of the relay's own, in outcome. Rows of both may be deleted at any time.
--
-- Run as: the owner of schema cdc_outbox. Safe to run again.

CREATE TABLE IF NOT EXISTS cdc_outbox.request (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot      text        NOT NULL,
    kind      text        NOT NULL CHECK (kind IN ('redrive', 'policy')),
    parked_id bigint,
    topic     text,
    key       text,
    body      text,
    reason    text,
    principal text        NOT NULL DEFAULT session_user,
    at        timestamptz NOT NULL DEFAULT now(),
    -- Rights are by column (roles.sql): who may ask for one thing cannot ask for another.
    CHECK ((kind = 'redrive') = (parked_id IS NOT NULL)),
    CHECK ((kind = 'policy') = (body IS NOT NULL AND reason IS NOT NULL)),
    CHECK (octet_length(body) <= 262144)
);

COMMENT ON TABLE cdc_outbox.request IS 'Asks the relay of slot for something; each row is carried out once';
COMMENT ON COLUMN cdc_outbox.request.parked_id IS 'The parked event that it is about';
COMMENT ON COLUMN cdc_outbox.request.topic IS 'Of a redrive: in place of the event''s own; so is key';
COMMENT ON COLUMN cdc_outbox.request.body IS 'Of a policy: its source; reason: why it is activated';
COMMENT ON COLUMN cdc_outbox.request.principal IS 'Who asks';

CREATE INDEX IF NOT EXISTS request_about ON cdc_outbox.request (parked_id);

CREATE TABLE IF NOT EXISTS cdc_outbox.outcome (
    request_id bigint      PRIMARY KEY,
    parked_id  bigint,
    result     text        NOT NULL CHECK (result IN ('redriven', 'activated', 'refused', 'passed over')),
    detail     text        NOT NULL DEFAULT '',
    at         timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE cdc_outbox.outcome IS 'What came of each request; the relay writes it. detail says why it was refused';
