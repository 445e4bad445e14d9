-- Everything the database knows of one sale, for the books, in one statement and so in one
-- snapshot. Variable: sale, its id. Answers one JSON document.
WITH
sale_orders AS (
  SELECT id, buyer_id, status, lines, returned, payment_id, seq, jsonb_array_length(lines) = 0 AS tombstone,
         status IN ('confirmed', 'returned') AS bought
  FROM orders WHERE sale_id = :'sale'
),
order_lines AS (
  SELECT o.id, o.buyer_id, o.status, o.bought, l ->> 'sku' AS sku, (l ->> 'quantity')::bigint AS quantity,
         coalesce((SELECT sum((r ->> 'quantity')::bigint) FROM jsonb_array_elements(o.returned) AS r
                   WHERE r ->> 'sku' = l ->> 'sku'), 0) AS returned
  FROM sale_orders o CROSS JOIN LATERAL jsonb_array_elements(o.lines) AS l
),
sale_refunds AS (
  SELECT order_id, payment_id, settled_at FROM refunds WHERE sale_id = :'sale'
),
sale_ledger AS (
  SELECT lane, epoch, seq, line, event, order_id, sku, available, held, sold
  FROM ledger WHERE sale_id = :'sale'
),
-- Every event has a line 0; only those that moved stock name an SKU.
moves AS (
  SELECT * FROM sale_ledger WHERE sku IS NOT NULL
),
fold AS (
  SELECT sku, sum(available) AS available, sum(held) AS held, sum(sold) AS sold,
         coalesce(sum(held) FILTER (WHERE event = 'holdfast.order.held'), 0) AS placed,
         coalesce(sum(sold) FILTER (WHERE event = 'holdfast.order.confirmed'), 0) AS bought,
         coalesce(-sum(sold) FILTER (WHERE event = 'holdfast.order.returned'), 0) AS returned,
         -- Returned, and not on sale again.
         coalesce(-sum(sold + available) FILTER (WHERE event = 'holdfast.order.returned'), 0) AS scrapped
  FROM moves GROUP BY sku
),
fold_by_order AS (
  SELECT order_id, sku, sum(available) AS available, sum(held) AS held, sum(sold) AS sold,
         count(*) FILTER (WHERE event = 'holdfast.order.held') AS held_times,
         coalesce(-sum(sold + available) FILTER (WHERE event = 'holdfast.order.returned'), 0) AS scrapped
  FROM moves WHERE order_id IS NOT NULL GROUP BY order_id, sku
),
-- Each order's last event, and the last that changed where it stands. One that was never held is a tombstone.
last_events AS (
  SELECT order_id, max(seq) AS seq,
         (array_agg(event ORDER BY seq DESC) FILTER (WHERE event <> 'holdfast.order.refund_due'))[1] AS event,
         bool_or(event = 'holdfast.order.held') AS was_held,
         count(*) FILTER (WHERE event = 'holdfast.order.confirmed') AS bought_times,
         count(*) FILTER (WHERE event = 'holdfast.order.refund_due') AS refunds
  FROM sale_ledger WHERE order_id IS NOT NULL AND line = 0 GROUP BY order_id
),
-- What an order's ledger must come to, by its status: what it neither holds nor bought is on sale again. An SKU
-- that was held and not bought is none of its lines any more.
due_by_order AS (
  SELECT id AS order_id, sku,
         CASE WHEN status IN ('held', 'paying') THEN quantity ELSE 0 END AS held,
         CASE WHEN bought THEN quantity - returned ELSE 0 END AS sold
  FROM order_lines
),
-- Every payment that was said to have succeeded: it bought, or must be given back (I7).
payments AS (
  SELECT id AS order_id, payment_id, 'confirm' AS of FROM sale_orders WHERE bought
  UNION ALL
  SELECT order_id, payment_id, 'refund' FROM sale_refunds
),
-- Every state that the lane went through, per SKU and per buyer.
states AS (
  SELECT sku,
         sum(available) OVER w AS available, sum(held) OVER w AS held, sum(sold) OVER w AS sold
  FROM moves WINDOW w AS (PARTITION BY lane, sku ORDER BY seq, line)
),
buyer_states AS (
  SELECT o.buyer_id, g.sku,
         sum(g.held + g.sold) OVER (PARTITION BY o.buyer_id, g.lane, g.sku ORDER BY g.seq, g.line) AS of_sku,
         sum(g.held + g.sold) OVER (PARTITION BY o.buyer_id, g.lane ORDER BY g.seq, g.line) AS of_sale
  FROM moves g JOIN sale_orders o ON o.id = g.order_id
),
counted AS (
  SELECT o.of, id AS text, 1 AS times
  FROM sale_orders CROSS JOIN LATERAL (VALUES
         ('place', NOT tombstone), ('tombstone', tombstone), ('cancel', status = 'cancelled' AND NOT tombstone)
       ) AS o (of, counts)
  WHERE o.counts
  UNION ALL
  SELECT of, order_id || ' ' || payment_id, 1 FROM payments
  UNION ALL
  SELECT o.of, buyer_id || ' ' || sku, o.units
  FROM order_lines CROSS JOIN LATERAL (VALUES ('bought', quantity), ('returned', returned)) AS o (of, units)
  WHERE bought
),
fingerprints AS (
  SELECT of, json_build_array(
           sum(times * ('x' || substr(md5(text), 1, 8))::bit(32)::bigint),
           sum(times * ('x' || substr(md5(text), 9, 8))::bit(32)::bigint)) AS halves
  FROM counted GROUP BY of
)
SELECT json_build_object(
  'orders', (SELECT json_build_object(
      'placed', count(*) FILTER (WHERE NOT tombstone),
      'tombstones', count(*) FILTER (WHERE tombstone),
      'bought', count(*) FILTER (WHERE bought),
      'returned', count(*) FILTER (WHERE status = 'returned'),
      'cancelled', count(*) FILTER (WHERE status = 'cancelled' AND NOT tombstone),
      'held', count(*) FILTER (WHERE status IN ('held', 'paying')),
      'expired', count(*) FILTER (WHERE status = 'expired')) FROM sale_orders),
  'ledger_orders', (SELECT json_build_object(
      'placed', count(*) FILTER (WHERE was_held),
      'tombstones', count(*) FILTER (WHERE NOT was_held),
      'bought', coalesce(sum(bought_times), 0),
      'returned', count(*) FILTER (WHERE event = 'holdfast.order.returned' AND NOT EXISTS (
          SELECT FROM fold_by_order f WHERE f.order_id = last_events.order_id AND f.sold <> 0)),
      'cancelled', count(*) FILTER (WHERE event = 'holdfast.order.cancelled' AND was_held),
      'held', count(*) FILTER (WHERE event IN
          ('holdfast.order.held', 'holdfast.order.payment_begun', 'holdfast.order.payment_failed')),
      'expired', count(*) FILTER (WHERE event = 'holdfast.order.expired')) FROM last_events),
  'ledger_events', (SELECT coalesce(json_object_agg(event, n), '{}') FROM (
      SELECT event, count(*) AS n FROM sale_ledger WHERE line = 0 GROUP BY event) e),
  'refunds', (SELECT json_build_object('due', count(*) FILTER (WHERE settled_at IS NULL),
      'settled', count(*) FILTER (WHERE settled_at IS NOT NULL)) FROM sale_refunds),
  'adjustments', (SELECT count(*) FROM adjustments WHERE sale_id = :'sale'),
  'fingerprints', (SELECT coalesce(json_object_agg(of, halves), '{}') FROM fingerprints),
  'counters', (SELECT coalesce(json_object_agg(sku, c), '{}') FROM (
      SELECT sku, sum(total) AS total, sum(available) AS available, sum(held) AS held, sum(sold) AS sold
      FROM counters WHERE sale_id = :'sale' GROUP BY sku) c),
  'ledger', (SELECT coalesce(json_object_agg(sku, f), '{}') FROM fold f),
  'records', (SELECT coalesce(json_object_agg(sku, r), '{}') FROM (
      SELECT sku, coalesce(sum(quantity) FILTER (WHERE status IN ('held', 'paying')), 0) AS held,
             coalesce(sum(quantity) FILTER (WHERE bought), 0) AS bought,
             coalesce(sum(returned) FILTER (WHERE bought), 0) AS returned
      FROM order_lines GROUP BY sku) r),
  'adjusted', (SELECT coalesce(json_object_agg(sku, d), '{}') FROM (
      SELECT sku, sum(delta) AS d FROM adjustments WHERE sale_id = :'sale' GROUP BY sku) a),
  'most_by_buyer', (SELECT coalesce(max(of_sale), 0) FROM buyer_states),
  'most_by_buyer_of_sku', (SELECT coalesce(json_object_agg(sku, m), '{}') FROM (
      SELECT sku, max(of_sku) AS m FROM buyer_states GROUP BY sku) b),
  'lanes', (SELECT count(*) FROM lanes WHERE sale_id = :'sale'),
  'wrong', json_build_object(
      'states_below_zero', (SELECT count(*) FROM states WHERE least(available, held, sold) < 0),
      'orders_against_ledger', (SELECT count(DISTINCT coalesce(f.order_id, d.order_id))
          FROM fold_by_order f FULL JOIN due_by_order d USING (order_id, sku)
          WHERE (f.held, f.sold) IS DISTINCT FROM (coalesce(d.held, 0), coalesce(d.sold, 0))
             OR f.available + f.held + f.sold + f.scrapped <> 0
             OR f.held_times <> 1),
      'orders_returned', (SELECT count(*) FROM sale_orders o WHERE (status = 'returned') IS DISTINCT FROM
          (bought AND NOT EXISTS (SELECT FROM order_lines l WHERE l.id = o.id AND l.quantity > l.returned))),
      'orders_bought_again', (SELECT count(*) FROM last_events WHERE bought_times > 1),
      'orders_without_payment', (SELECT count(*) FROM sale_orders WHERE bought AND payment_id IS NULL),
      'payments_twice', (SELECT count(*) FROM (
          SELECT FROM payments GROUP BY order_id, payment_id HAVING count(*) > 1) AS twice),
      'refunds_against_ledger', (SELECT count(*)
          FROM (SELECT order_id, count(*) AS refunds FROM sale_refunds GROUP BY order_id) r
          FULL JOIN last_events e USING (order_id) WHERE coalesce(r.refunds, 0) IS DISTINCT FROM coalesce(e.refunds, 0)),
      'orders_behind_ledger', (SELECT count(*)
          FROM sale_orders o FULL JOIN last_events e ON e.order_id = o.id
          WHERE o.seq IS DISTINCT FROM e.seq),
      'seqs_missing', (SELECT coalesce(sum(l.recorded - (
            SELECT count(DISTINCT seq) FROM sale_ledger g WHERE g.lane = l.lane)), 0)
          FROM lanes l WHERE l.sale_id = :'sale'),
      'seqs_beyond', (SELECT count(*) FROM sale_ledger g JOIN lanes l ON l.sale_id = :'sale' AND l.lane = g.lane
          WHERE g.seq > l.recorded),
      'parked', (SELECT count(*) FROM parked WHERE sale_id = :'sale'),
      'dead_letters', (SELECT count(*) FROM dead_letters WHERE sale_id = :'sale'))
);
