-- Everything the database knows of one sale, for the books, in one statement and so in one
-- snapshot. Variable: sale, its id. Answers one JSON document.
WITH
sale_orders AS (
  SELECT id, buyer_id, status, lines, seq, jsonb_array_length(lines) = 0 AS tombstone
  FROM orders WHERE sale_id = :'sale'
),
order_lines AS (
  SELECT o.id, o.buyer_id, o.status, l ->> 'sku' AS sku, (l ->> 'quantity')::bigint AS quantity
  FROM sale_orders o CROSS JOIN LATERAL jsonb_array_elements(o.lines) AS l
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
         coalesce(sum(held) FILTER (WHERE event = 'holdfast.order.held'), 0) AS placed
  FROM moves GROUP BY sku
),
fold_by_order AS (
  SELECT order_id, sku, sum(available) AS available, sum(held) AS held, sum(sold) AS sold,
         count(*) FILTER (WHERE event = 'holdfast.order.held') AS held_times
  FROM moves WHERE order_id IS NOT NULL GROUP BY order_id, sku
),
-- Each order's last event. One that was never held is a tombstone.
last_events AS (
  SELECT order_id, max(seq) AS seq, (array_agg(event ORDER BY seq DESC))[1] AS event,
         bool_or(event = 'holdfast.order.held') AS was_held
  FROM sale_ledger WHERE order_id IS NOT NULL AND line = 0 GROUP BY order_id
),
-- What an order's ledger must come to, by its status.
due_by_order AS (
  SELECT id AS order_id, sku,
         CASE WHEN status IN ('held', 'paying', 'confirmed') THEN -quantity ELSE 0 END AS available,
         CASE WHEN status IN ('held', 'paying') THEN quantity ELSE 0 END AS held,
         CASE WHEN status = 'confirmed' THEN quantity ELSE 0 END AS sold
  FROM order_lines
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
fingerprints AS (
  SELECT o.step, json_build_array(
           coalesce(sum(('x' || substr(md5(id), 1, 8))::bit(32)::bigint), 0),
           coalesce(sum(('x' || substr(md5(id), 9, 8))::bit(32)::bigint), 0)) AS halves
  FROM sale_orders CROSS JOIN LATERAL (VALUES
         ('place', NOT tombstone), ('tombstone', tombstone),
         ('confirm', status = 'confirmed'), ('cancel', status = 'cancelled' AND NOT tombstone)
       ) AS o (step, counts)
  WHERE o.counts GROUP BY o.step
)
SELECT json_build_object(
  'orders', (SELECT json_build_object(
      'placed', count(*) FILTER (WHERE NOT tombstone),
      'tombstones', count(*) FILTER (WHERE tombstone),
      'confirmed', count(*) FILTER (WHERE status = 'confirmed'),
      'cancelled', count(*) FILTER (WHERE status = 'cancelled' AND NOT tombstone),
      'held', count(*) FILTER (WHERE status IN ('held', 'paying')),
      'expired', count(*) FILTER (WHERE status = 'expired')) FROM sale_orders),
  'ledger_orders', (SELECT json_build_object(
      'placed', count(*) FILTER (WHERE was_held),
      'tombstones', count(*) FILTER (WHERE NOT was_held),
      'confirmed', count(*) FILTER (WHERE event = 'holdfast.order.confirmed'),
      'cancelled', count(*) FILTER (WHERE event = 'holdfast.order.cancelled' AND was_held),
      'held', count(*) FILTER (WHERE event = 'holdfast.order.held'),
      'expired', count(*) FILTER (WHERE event = 'holdfast.order.expired')) FROM last_events),
  'adjustments', (SELECT count(*) FROM adjustments WHERE sale_id = :'sale'),
  'ledger_adjustments', (SELECT count(*) FROM sale_ledger WHERE event = 'holdfast.stock.adjusted'),
  'fingerprints', (SELECT coalesce(json_object_agg(step, halves), '{}') FROM fingerprints),
  'counters', (SELECT coalesce(json_object_agg(sku, c), '{}') FROM (
      SELECT sku, sum(total) AS total, sum(available) AS available, sum(held) AS held, sum(sold) AS sold
      FROM counters WHERE sale_id = :'sale' GROUP BY sku) c),
  'ledger', (SELECT coalesce(json_object_agg(sku, f), '{}') FROM fold f),
  'records', (SELECT coalesce(json_object_agg(sku, r), '{}') FROM (
      SELECT sku, sum(quantity) AS placed,
             coalesce(sum(quantity) FILTER (WHERE status IN ('held', 'paying')), 0) AS held,
             coalesce(sum(quantity) FILTER (WHERE status = 'confirmed'), 0) AS sold
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
          WHERE (f.available, f.held, f.sold) IS DISTINCT FROM (d.available, d.held, d.sold)
             OR f.held_times <> 1),
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
