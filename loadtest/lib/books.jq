# Judges the books of one run. Input: {summary, stock, refunds, database}. Output: {rows, rules, balance},
# rows as text in columns, rules with what was found against them.
#
# A row puts side by side what each source says of the same thing: k6 (a range, for what was never
# answered may have happened), the live stock, the counters, the ledger's fold, the records (orders
# and adjustments). All that say anything must say the same.

def number: if . == null then 0 else . end;

# What was asked and not answered may have happened: done, or up to that many more.
def range_of($step): .summary.steps[$step] | {min: .done, max: (.done + .unknown)};
def is_certain($step): .summary.steps[$step].unknown == 0;
# A payment whose outcome nobody was told may have bought, or must be given back.
def refunds: .summary.steps.confirm | {min: .refund, max: (.refund + .unknown)};
def payments: .summary.steps.confirm | {min: (.done + .refund), max: (.done + .refund + .unknown)};
# Units of unanswered orders are not known one by one: then only the lower end is.
def units_of($sku; $kind; $step): (.summary.units[$sku][$kind]) as $units
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
  .database as $db | .refunds as $listed
  | ($db.ledger_events["holdfast.order.refund_due"] | number) as $refunds_due
  | row("orders placed"; range_of("place"); null; null; $db.ledger_orders.placed; $db.orders.placed),
    row("orders paid"; range_of("confirm"); null; null; $db.ledger_orders.bought; $db.orders.bought),
    row("orders cancelled"; range_of("cancel"); null; null; $db.ledger_orders.cancelled; $db.orders.cancelled),
    row("orders expired"; null; null; null; $db.ledger_orders.expired; $db.orders.expired),
    row("orders held"; null; null; null; $db.ledger_orders.held; $db.orders.held),
    row("orders returned, all of it"; null; null; null; $db.ledger_orders.returned; $db.orders.returned),
    row("cancelled before they came"; range_of("tombstone"); null; null; $db.ledger_orders.tombstones; $db.orders.tombstones),
    row("payments begun"; range_of("begin"); null; null;
      $db.ledger_events["holdfast.order.payment_begun"] | number; null),
    row("payments failed"; range_of("fail"); null; null;
      $db.ledger_events["holdfast.order.payment_failed"] | number; null),
    row("payments that succeeded"; payments; null; null; $db.ledger_orders.bought + $refunds_due;
      $db.orders.bought + $db.refunds.due + $db.refunds.settled),
    row("payments to give back"; refunds; $listed.due + $listed.settled; null; $refunds_due;
      $db.refunds.due + $db.refunds.settled),
    row("payments given back"; range_of("settle"); $listed.settled; null; null; $db.refunds.settled),
    row("returns"; range_of("return"); null; null; $db.ledger_events["holdfast.order.returned"] | number; null),
    row("adjustments"; range_of("adjust"); null; null; $db.ledger_events["holdfast.stock.adjusted"] | number; $db.adjustments);

def sku_rows($sku; $initial):
  .summary.units[$sku] as $asked
  | .stock[$sku] as $live | .database.counters[$sku] as $counters | .database.ledger[$sku] as $ledger
  | (.database.records[$sku] // {held: 0, bought: 0, returned: 0}) as $records
  | ($records.bought - $records.returned) as $sold
  # That a return was not put on sale again only the ledger says.
  | ($initial + (.database.adjusted[$sku] | number) - ($ledger.scrapped | number)) as $total
  | ($initial + $asked.restock - $asked.write_off - $asked.scrap) as $asked_total
  | ($asked.confirm - $asked.return) as $asked_sold
  | row("\($sku) total"; (if is_certain("adjust") and is_certain("return") then {min: $asked_total, max: $asked_total} else null end);
      $live.total | number; $counters.total | number;
      ($ledger | [.available, .held, .sold] | map(number) | add); $total),
    row("\($sku) available"; null; $live.available | number; $counters.available | number;
      $ledger.available | number; $total - $records.held - $sold),
    row("\($sku) held"; null; $live.held | number; $counters.held | number; $ledger.held | number; $records.held),
    row("\($sku) sold"; (if is_certain("confirm") and is_certain("return") then {min: $asked_sold, max: $asked_sold} else null end);
      $live.sold | number; $counters.sold | number; $ledger.sold | number; $sold),
    row("\($sku) placed, in all"; units_of($sku; "place"; "place"); null; null; $ledger.placed | number; null),
    row("\($sku) bought, in all"; units_of($sku; "confirm"; "confirm"); null; null; $ledger.bought | number; $records.bought),
    row("\($sku) returned"; units_of($sku; "return"; "return"); null; null; $ledger.returned | number; $records.returned),
    row("\($sku) returned, not restocked"; units_of($sku; "scrap"; "return"); null; null; $ledger.scrapped | number; null);

def rule($what; $found): {$what, $found, balanced: ($found == 0)};

# Equal sums, and equal numbers: the very orders (payments, units of a buyer) that were answered are
# recorded, each once. With steps of which nobody was told, the sums may differ and prove nothing.
def same($of; $step; $what):
  (.database.fingerprints[$of] // [0, 0]) as $recorded
  | if is_certain($step)
    then rule($what; if .summary.fingerprints[$of] == $recorded then 0 else 1 end)
    else {$what, found: "unknown", balanced: true} end;

def rules:
  .database as $db | .summary.sale as $sale
  | rule("SKUs that only some know of";
      [[.stock, $db.counters, $db.ledger | keys] | unique | length - 1] | add),
    same("place"; "place"; "the orders recorded are not those that were answered"),
    same("cancel"; "cancel"; "the orders cancelled are not those that were answered so"),
    same("tombstone"; "tombstone"; "the keys cancelled before their order are not those that were answered so"),
    same("confirm"; "confirm"; "the payments that bought are not those that were answered so"),
    same("refund"; "confirm"; "the payments to give back are not those that were answered so"),
    same("bought"; "confirm"; "some buyer bought other units than was answered"),
    same("returned"; "return"; "some buyer returned other units than was answered"),
    rule("payments that bought and must be given back, or must be twice"; $db.wrong.payments_twice),
    rule("orders bought without a payment"; $db.wrong.orders_without_payment),
    rule("orders bought more than once"; $db.wrong.orders_bought_again),
    rule("orders whose refunds are not those of their ledger"; $db.wrong.refunds_against_ledger),
    rule("orders that are called returned and are not, or the other way round"; $db.wrong.orders_returned),
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
