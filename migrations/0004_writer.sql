-- What the writer could not apply: yet (parked), or at all (dead letters). Records are kept whole.

CREATE TABLE parked (
    sale_id       text        COLLATE "C" NOT NULL,
    lane          smallint    NOT NULL,
    seq           bigint      NOT NULL,
    digest        bytea       NOT NULL,
    topic         text        NOT NULL,
    partition     integer     NOT NULL,
    record_offset bigint      NOT NULL,
    headers       jsonb       NOT NULL,
    payload       bytea       NOT NULL,
    parked_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sale_id, lane, seq, digest),
    FOREIGN KEY (sale_id, lane) REFERENCES lanes (sale_id, lane)
);
COMMENT ON TABLE parked IS 'Events that wait for a missing earlier one of their lane.';
COMMENT ON COLUMN parked.digest IS 'BLAKE3 of headers and payload: the same record twice is one row, a fork is two.';
COMMENT ON COLUMN parked.headers IS '[{"name", "value"}] where the value is text, [{"name", "base64"}] where it is not.';

CREATE TABLE dead_letters (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    reason        text        NOT NULL,
    detail        text        NOT NULL,
    sale_id       text        COLLATE "C",
    lane          smallint,
    epoch         bigint,
    seq           bigint,
    topic         text        NOT NULL,
    partition     integer     NOT NULL,
    record_offset bigint      NOT NULL,
    digest        bytea       NOT NULL,
    headers       jsonb       NOT NULL,
    payload       bytea       NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    -- Kafka delivers again after a crash: the same record at the same place is the same letter.
    UNIQUE (topic, partition, record_offset, digest)
);
COMMENT ON TABLE dead_letters IS 'Records that cannot be decoded or applied, with reason and place, to be looked at and retried.';
