-- Lanes that are opened anew after Redis lost something of them, and what their rebuild needs to know.

ALTER TABLE lanes
    ADD COLUMN rebuild_token bigint,
    ADD COLUMN sealed_epoch  bigint NOT NULL DEFAULT 1 CHECK (sealed_epoch > 0),
    ADD COLUMN sealed_seq    bigint NOT NULL DEFAULT 0 CHECK (sealed_seq >= 0),
    ADD COLUMN version       bigint NOT NULL DEFAULT 0 CHECK (version >= 0);
UPDATE lanes SET sealed_epoch = lanes.epoch, version = sales.version
    FROM sales WHERE sales.sale_id = lanes.sale_id;
COMMENT ON COLUMN lanes.epoch IS 'The highest epoch that was given out. It is open once it is sealed.';
COMMENT ON COLUMN lanes.rebuild_token IS 'Given out with the epoch: only who names it may rebuild and open the lane.';
COMMENT ON COLUMN lanes.sealed_epoch IS
    'The epoch of the last seal: only its events are applied. sealed_seq is what was recorded at that seal.';
COMMENT ON COLUMN lanes.version IS 'Of the definition that the lane recorded last.';

ALTER TABLE orders
    ADD COLUMN hold_seconds integer,
    ADD COLUMN asked        jsonb NOT NULL DEFAULT '[]';
COMMENT ON COLUMN orders.hold_seconds IS 'As the caller asked; null: the sale''s own time.';
COMMENT ON COLUMN orders.asked IS 'The lines that were asked for, where not all of them were bought; else empty.';

CREATE TABLE returns (
    sale_id  text     COLLATE "C" NOT NULL,
    lane     smallint NOT NULL,
    order_id text     COLLATE "C" NOT NULL,
    key      text     COLLATE "C" NOT NULL,
    restock  boolean  NOT NULL,
    lines    jsonb    NOT NULL,
    seq      bigint   NOT NULL CHECK (seq > 0),
    PRIMARY KEY (order_id, key)
);
CREATE INDEX returns_by_lane ON returns (sale_id, lane);
COMMENT ON TABLE returns IS
    'Returns as they were asked for, for their replays: key is the hash of order and idempotency key, lines are empty where all that was left came back.';

CREATE TABLE rebuilds (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sale_id      text        COLLATE "C" NOT NULL,
    lane         smallint    NOT NULL,
    epoch_before bigint      NOT NULL,
    epoch        bigint,
    why          text        COLLATE "C" NOT NULL,
    actor        text        COLLATE "C" NOT NULL,
    seq_before   bigint,
    seq          bigint,
    lost_orders  text[]      NOT NULL DEFAULT '{}',
    lost_max     bigint      NOT NULL DEFAULT 0 CHECK (lost_max >= 0),
    outcome      text        COLLATE "C" NOT NULL
        CHECK (outcome IN ('opened', 'rebuilt', 'in-doubt', 'failed')),
    detail       text        NOT NULL DEFAULT '',
    began_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', now()),
    ended_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', now())
);
CREATE INDEX rebuilds_by_lane ON rebuilds (sale_id, lane, id DESC);
COMMENT ON TABLE rebuilds IS
    'One row each time that a lane was opened anew, or could not be: the report for operators, and the audit row.';
COMMENT ON COLUMN rebuilds.seq_before IS 'Where the lane in Redis stood; null: it was not there. seq is where it was opened.';
COMMENT ON COLUMN rebuilds.lost_orders IS
    'Orders that were answered and are in neither Kafka nor the database, as far as a live instance remembers; lost_max is how many events at most.';
