-- Sales as operators defined them, and the lanes that their events come from.

CREATE TABLE sales (
    sale_id           text        COLLATE "C" PRIMARY KEY,
    version           bigint      NOT NULL DEFAULT 0 CHECK (version >= 0),
    definition        jsonb,
    digest            text,
    id_secret_version smallint    NOT NULL REFERENCES id_secrets (version),
    opens_at          timestamptz,
    closes_at         timestamptz,
    paused            boolean     NOT NULL DEFAULT false,
    closed_at         timestamptz,
    archived_at       timestamptz,
    steps_seq         bigint      NOT NULL DEFAULT 0,
    -- In milliseconds, like every time that callers see: a list's cursor carries it.
    created_at        timestamptz NOT NULL DEFAULT date_trunc('milliseconds', now()),
    CHECK ((version = 0) = (definition IS NULL)),
    CHECK ((version = 0) = (digest IS NULL))
);
CREATE INDEX sales_by_age ON sales (created_at DESC, sale_id DESC) WHERE version > 0;
COMMENT ON TABLE sales IS
    'One row a sale. Version 0 is being defined: no caller sees it. The definition comes from the operator API (and from the lane''s own event, whichever is first); paused, closed_at and archived_at come from lane 0''s events only.';
COMMENT ON COLUMN sales.steps_seq IS 'Seq of lane 0''s event that last set paused, closed_at or archived_at: they never go backwards.';
COMMENT ON COLUMN sales.opens_at IS 'Copied from the definition, for queries; closes_at too.';

CREATE TABLE sale_definitions (
    sale_id    text        COLLATE "C" NOT NULL REFERENCES sales (sale_id),
    version    bigint      NOT NULL CHECK (version > 0),
    definition jsonb       NOT NULL,
    actor      text        NOT NULL,
    defined_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sale_id, version)
);
COMMENT ON TABLE sale_definitions IS 'Every version that a sale ever had.';

CREATE TABLE lanes (
    sale_id   text     COLLATE "C" NOT NULL REFERENCES sales (sale_id),
    lane      smallint NOT NULL CHECK (lane BETWEEN 0 AND 63),
    partition integer  NOT NULL CHECK (partition >= 0),
    epoch     bigint   NOT NULL DEFAULT 1 CHECK (epoch > 0),
    recorded  bigint   NOT NULL DEFAULT 0 CHECK (recorded >= 0),
    PRIMARY KEY (sale_id, lane)
) WITH (fillfactor = 50); -- every batch updates rows in place: leave room for HOT updates
COMMENT ON TABLE lanes IS 'A lane''s Kafka partition, fixed when it is made, and how far its events are recorded.';
COMMENT ON COLUMN lanes.recorded IS
    'Seq of the last event applied: the fence, the de-duplication and the gap detector of the writer in one.';
