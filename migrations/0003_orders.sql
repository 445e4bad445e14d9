-- What the writer records: orders as they last stood, every event, and where the units are.

CREATE TABLE orders (
    id           text        COLLATE "C" PRIMARY KEY,
    sale_id      text        COLLATE "C" NOT NULL,
    lane         smallint    NOT NULL,
    buyer_id     text        COLLATE "C" NOT NULL,
    status       text        COLLATE "C" NOT NULL CHECK (status IN ('held', 'confirmed', 'cancelled', 'expired')),
    lines        jsonb       NOT NULL,
    payment_id   text        COLLATE "C",
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    confirmed_at timestamptz,
    seq          bigint      NOT NULL CHECK (seq > 0)
) WITH (fillfactor = 80);
-- Lists are newest first, by (created_at, id). A list that names no status merges one range of the
-- index a status, so two indexes serve the lists of a sale and of all, with a status and without.
CREATE INDEX orders_by_sale ON orders (sale_id, status, created_at DESC, id DESC);
CREATE INDEX orders_by_status ON orders (status, created_at DESC, id DESC);
CREATE INDEX orders_by_buyer ON orders (buyer_id, created_at DESC, id DESC);
COMMENT ON TABLE orders IS 'Each order after its last recorded event; lines are [{"sku", "quantity"}].';

CREATE TABLE ledger (
    sale_id       text        COLLATE "C" NOT NULL,
    lane          smallint    NOT NULL,
    epoch         bigint      NOT NULL,
    seq           bigint      NOT NULL CHECK (seq > 0),
    line          smallint    NOT NULL CHECK (line >= 0),
    event         text        COLLATE "C" NOT NULL,
    order_id      text        COLLATE "C",
    adjustment_id text        COLLATE "C",
    cause         text        COLLATE "C",
    reason        text,
    actor         text        COLLATE "C",
    trace_id      text        COLLATE "C",
    sku           text        COLLATE "C",
    available     bigint      NOT NULL,
    held          bigint      NOT NULL,
    sold          bigint      NOT NULL,
    at            timestamptz NOT NULL,
    PRIMARY KEY (sale_id, lane, seq, line),
    CHECK (sku IS NOT NULL OR (available = 0 AND held = 0 AND sold = 0))
);
-- By hash: four bytes an entry where the id itself would be eighty, and only equality is asked.
CREATE INDEX ledger_by_order ON ledger USING hash (order_id) WHERE line = 0;
COMMENT ON TABLE ledger IS
    'Append-only: what each event changed, a row a SKU. An event that moved no stock has one row without SKU, so every event is found at line 0.';

CREATE FUNCTION refuse_ledger_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the ledger is append-only' USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE ON ledger
    FOR EACH ROW EXECUTE FUNCTION refuse_ledger_change();
CREATE TRIGGER ledger_not_truncated BEFORE TRUNCATE ON ledger
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_ledger_change();

CREATE TABLE counters (
    sale_id   text     COLLATE "C" NOT NULL,
    lane      smallint NOT NULL,
    sku       text     COLLATE "C" NOT NULL,
    total     bigint   NOT NULL CHECK (total BETWEEN 0 AND 1000000000),
    available bigint   NOT NULL CHECK (available >= 0),
    held      bigint   NOT NULL CHECK (held >= 0),
    sold      bigint   NOT NULL CHECK (sold >= 0),
    version   bigint   NOT NULL CHECK (version >= 0),
    PRIMARY KEY (sale_id, lane, sku),
    CONSTRAINT counters_conserve CHECK (total = available + held + sold)
) WITH (fillfactor = 50);
COMMENT ON TABLE counters IS
    'Where a SKU''s units are in a lane: the fold of the ledger. total moves by definitions and adjustments alone, so the check is invariant I1.';

CREATE TABLE adjustments (
    id               text        COLLATE "C" PRIMARY KEY,
    sale_id          text        COLLATE "C" NOT NULL,
    lane             smallint    NOT NULL,
    sku              text        COLLATE "C" NOT NULL,
    delta            bigint      NOT NULL CHECK (delta <> 0),
    before_available bigint      NOT NULL,
    before_held      bigint      NOT NULL,
    before_sold      bigint      NOT NULL,
    before_version   bigint      NOT NULL,
    reason           text        NOT NULL
        CHECK (reason IN ('restock', 'damaged', 'lost', 'recount', 'correction', 'other')),
    reference        text,
    note             text,
    actor            text        NOT NULL,
    created_at       timestamptz NOT NULL,
    seq              bigint      NOT NULL,
    after_available  bigint      NOT NULL GENERATED ALWAYS AS (before_available + delta) STORED
);
CREATE INDEX adjustments_by_sale ON adjustments (sale_id, created_at DESC, id DESC);
CREATE INDEX adjustments_by_sku ON adjustments (sale_id, sku, created_at DESC, id DESC);
COMMENT ON TABLE adjustments IS
    'The audit trail of totals. held and sold are the same after as before; the version after is one more.';
