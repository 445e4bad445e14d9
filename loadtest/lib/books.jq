# Judges the books of one run. Input: {summary, stock, database}. Output: {rows, rules, balance},
# rows as text in columns, rules with what was found against them.
#
# A row puts side by side what each source says of the same thing: k6 (a range, for what was never
# answered may have happened), the live stock, the counters, the ledger's fold, the records (orders
# and adjustments). All that say anything must say the same.

def number: if . == null then 0 else . end;

# What was asked and not answered may have happened: done, or up to that many more.
def range_of($step): .summary.steps[$step] | {min: .done, max: (.done + .unknown)};
def is_certain($step): .summary.steps[$step].unknown == 0;
# Units of unanswered orders are not known one by one: then only the lower end is.
def units_of($sku; $step): (.summary.units[$sku][$step]) as $units
  | {min: $units, max: (if is_certain($step) then $units else null end)};

def row($what; $k6; $live; $counters; $ledger; $records):
  [$live, $counters, $ledger, $records] as $said
  | ($said | map(select(. != null))) as $known
  | {
      $what,
      columns: ([
        (if $k6 == null then "" elif $k6.max == $k6.min then "\($k6.min)"
         elif $k6.max == null then "\($k6.min) or more" else "\($k6.min)..\($k6.max)" end)
      ] + ($said | map(if . == null then "" else tostring end))),
      balanced: (($known | unique | length) <= 1 and
        ($k6 == null or all($known[]; . >= $k6.min and ($k6.max == null or . <= $k6.max))))
    };

def order_rows:
  .database as $db
  | row("orders placed"; range_of("place"); null; null; $db.ledger_orders.placed; $db.orders.placed),
    row("orders confirmed"; range_of("confirm"); null; null; $db.ledger_orders.confirmed; $db.orders.confirmed),
    row("orders cancelled"; range_of("cancel"); null; null; $db.ledger_orders.cancelled; $db.orders.cancelled),
    row("orders expired"; null; null; null; $db.ledger_orders.expired; $db.orders.expired),
    row("orders held"; null; null; null; $db.ledger_orders.held; $db.orders.held),
    row("cancelled before they came"; range_of("tombstone"); null; null; $db.ledger_orders.tombstones; $db.orders.tombstones),
    row("adjustments"; range_of("adjust"); null; null; $db.ledger_adjustments; $db.adjustments);

def sku_rows($sku; $initial):
  .summary.units[$sku] as $asked
  | .stock[$sku] as $live | .database.counters[$sku] as $counters | .database.ledger[$sku] as $ledger
  | (.database.records[$sku] // {placed: 0, held: 0, sold: 0}) as $records
  | ($initial + (.database.adjusted[$sku] | number)) as $total
  | ($initial + $asked.restock - $asked.write_off) as $asked_total
  | row("\($sku) total"; (if is_certain("adjust") then {min: $asked_total, max: $asked_total} else null end);
      $live.total | number; $counters.total | number;
      ($ledger | [.available, .held, .sold] | map(number) | add); $total),
    row("\($sku) available"; null; $live.available | number; $counters.available | number;
      $ledger.available | number; $total - $records.held - $records.sold),
    row("\($sku) held"; null; $live.held | number; $counters.held | number; $ledger.held | number; $records.held),
    row("\($sku) sold"; units_of($sku; "confirm"); $live.sold | number; $counters.sold | number;
      $ledger.sold | number; $records.sold),
    row("\($sku) placed, in all"; units_of($sku; "place"); null; null; $ledger.placed | number; $records.placed);

def rule($what; $found): {$what, $found, balanced: ($found == 0)};

# Equal sums over the ids, and equal numbers: the very orders that were answered are recorded,
# each once. With requests that nobody answered the sums may differ, and prove nothing.
def same_orders($step; $what):
  (.database.fingerprints[$step] // [0, 0]) as $recorded
  | if is_certain($step)
    then rule($what; if .summary.fingerprints[$step] == $recorded then 0 else 1 end)
    else {$what, found: "unknown", balanced: true} end;

def rules:
  .database as $db | .summary.sale as $sale
  | rule("SKUs that only some know of";
      [[.stock, $db.counters, $db.ledger | keys] | unique | length - 1] | add),
    same_orders("place"; "the orders recorded are not those that were answered"),
    same_orders("confirm"; "the orders confirmed are not those that were answered so"),
    same_orders("cancel"; "the orders cancelled are not those that were answered so"),
    same_orders("tombstone"; "the keys cancelled before their order are not those that were answered so"),
    rule("orders whose ledger does not come to what their status says"; $db.wrong.orders_against_ledger),
    rule("orders whose last event is not that of their ledger"; $db.wrong.orders_behind_ledger),
    rule("states of the ledger below zero (oversold)"; $db.wrong.states_below_zero),
    rule("live counters with available + held + sold other than total";
      [.stock[] | select(.available + .held + .sold != .total)] | length),
    rule("units that some buyer had above the sale's limit";
      [0, $db.most_by_buyer - ($sale.per_buyer_limit // $db.most_by_buyer)] | max),
    rule("units that some buyer had above an SKU's limit";
      [0, ($sale.skus[] | select(.per_buyer_limit != null)
        | ($db.most_by_buyer_of_sku[.sku] | number) - .per_buyer_limit)] | max),
    rule("lanes missing"; if $db.lanes >= 1 then 0 else 1 end),
    rule("gaps in a lane's recorded sequence"; $db.wrong.seqs_missing),
    rule("ledger lines outside a lane's recorded sequence"; $db.wrong.seqs_beyond),
    rule("events that wait for a missing one"; $db.wrong.parked),
    rule("events that could not be recorded"; $db.wrong.dead_letters);

. as $books
| [$books.summary.sale.skus[] as $s | $books | sku_rows($s.sku; $s.stock)] as $sku_rows
| {rows: ([$books | order_rows] + $sku_rows), rules: [$books | rules]}
| .balance = all(.rows[], .rules[]; .balanced)
