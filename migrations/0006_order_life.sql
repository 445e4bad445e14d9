-- Payments that run, partial and late confirms, returns, and payments to give back.

ALTER TABLE orders
    ALTER COLUMN buyer_id DROP NOT NULL,
    ADD COLUMN returned   jsonb   NOT NULL DEFAULT '[]',
    ADD COLUMN reacquired boolean NOT NULL DEFAULT false,
    DROP CONSTRAINT orders_status_check,
    ADD CONSTRAINT orders_status_check CHECK
        (status IN ('held', 'paying', 'confirmed', 'returned', 'cancelled', 'expired'));
COMMENT ON COLUMN orders.buyer_id IS
    'Null for a tombstone that a payment left for a genuine id that nobody knew any more.';

CREATE TABLE refunds (
    id         text        COLLATE "C" PRIMARY KEY,
    sale_id    text        COLLATE "C" NOT NULL,
    order_id   text        COLLATE "C" NOT NULL,
    payment_id text        COLLATE "C" NOT NULL,
    reason     text        COLLATE "C" NOT NULL
        CHECK (reason IN ('payment-too-late', 'order-cancelled', 'already-paid', 'lines-mismatch')),
    created_at timestamptz NOT NULL,
    settled_at timestamptz
);
CREATE INDEX refunds_due ON refunds (created_at DESC, id DESC) WHERE settled_at IS NULL;
CREATE INDEX refunds_settled ON refunds (created_at DESC, id DESC) WHERE settled_at IS NOT NULL;
CREATE INDEX refunds_by_age ON refunds (created_at DESC, id DESC);
CREATE INDEX refunds_by_sale ON refunds (sale_id, created_at DESC, id DESC);
COMMENT ON TABLE refunds IS
    'Payments without goods, each to be given back by the shop: one row per order and payment, its id made of both. From events; for an archived sale, whose lane is gone, from the call itself. settled_at is the shop''s word.';
