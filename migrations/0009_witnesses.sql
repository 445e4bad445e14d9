-- Who talks to lanes, and what each has seen of a lane that may have forgotten something.

CREATE TABLE instances (
    name         text        COLLATE "C" PRIMARY KEY,
    roles        text[]      COLLATE "C" NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE instances IS
    'Processes that talk to lanes. One whose heartbeat is older than witness.gone_after_ms counts as gone.';

CREATE TABLE testimonies (
    request     bigint      NOT NULL,
    instance    text        COLLATE "C" NOT NULL,
    sale_id     text        COLLATE "C" NOT NULL,
    lane        smallint    NOT NULL,
    asked_at    timestamptz NOT NULL DEFAULT now(),
    answered_at timestamptz,
    epoch       bigint      CHECK (epoch >= 0),
    seq         bigint      CHECK (seq >= 0),
    logged      bigint      CHECK (logged >= 0),
    unlisted    bigint      CHECK (unlisted >= 0),
    order_seqs  bigint[],
    order_keys  text[]      COLLATE "C",
    PRIMARY KEY (request, instance),
    CONSTRAINT testimonies_answered CHECK (
        num_nulls(answered_at, epoch, seq, logged, unlisted, order_seqs, order_keys) IN (0, 7)
    )
);
CREATE INDEX testimonies_open ON testimonies (instance) WHERE answered_at IS NULL;
CREATE INDEX testimonies_by_age ON testimonies (asked_at);
COMMENT ON TABLE testimonies IS
    'Whoever recovers a lane asks each instance for one; it answers what it has seen of the lane.';
COMMENT ON COLUMN testimonies.epoch IS 'The highest that it has seen, as seq is within it; 0: nothing.';
COMMENT ON COLUMN testimonies.logged IS 'The highest mark of Kafka that it has seen of that epoch.';
COMMENT ON COLUMN testimonies.order_seqs IS
    'The orders above logged that it has told somebody of, each by the seq that it then had; order_keys: which, as their ids name them.';
COMMENT ON COLUMN testimonies.unlisted IS
    'It has told of more than it may keep: up to this seq some are not among them. 0: all are.';
