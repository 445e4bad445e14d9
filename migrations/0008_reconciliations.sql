-- What the reconciler found: where Redis and the database, or the books of one of them, differ.

CREATE TABLE reconciliations (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sale_id       text        COLLATE "C" NOT NULL,
    lane          smallint    NOT NULL,
    what          text        COLLATE "C" NOT NULL,
    subject       text        COLLATE "C" NOT NULL,
    detail        text        NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT date_trunc('milliseconds', now()),
    last_seen_at  timestamptz NOT NULL DEFAULT date_trunc('milliseconds', now()),
    ended_at      timestamptz
);
CREATE UNIQUE INDEX reconciliations_open ON reconciliations (sale_id, lane, what, subject)
    WHERE ended_at IS NULL;
CREATE INDEX reconciliations_ended ON reconciliations (ended_at) WHERE ended_at IS NOT NULL;
COMMENT ON TABLE reconciliations IS
    'One row a difference, from when it was first seen until it was no longer there. ended_at null: it was there when its lane was last checked.';
COMMENT ON COLUMN reconciliations.what IS 'Which figures differ; subject is the SKU, order or buyer they are of.';
COMMENT ON COLUMN reconciliations.detail IS 'The figures, as they were last seen.';
