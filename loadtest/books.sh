#!/usr/bin/env bash
# Do the books balance? Compares what a load test was answered (summary.json, written by k6) with the
# live stock, the work list of refunds, the recorded orders, counters and ledger of the sale it pressed on.
#
# usage: HOLDFAST_LOAD_DIR=… loadtest/books.sh      (in the environment of `./dev env`)
# exit:  0 the books balance · 1 they do not · 2 that could not be judged
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# How long recording may take in all.
DEADLINE_SECONDS=${LOAD_BOOKS_SECONDS:-120}
# Books that do not balance may only be behind. They are wrong when nothing has moved for this long.
STILL_SECONDS=${LOAD_BOOKS_STILL_SECONDS:-15}
# Books that balance must do so again after this long: something may still have been on its way.
SETTLED_SECONDS=1
PAUSE_SECONDS=0.25

exec 3>&2 # a look may keep what went wrong in it to itself
cannot_judge() {
  printf 'books: %s\n' "$*" >&3
  exit 2
}

for tool in curl jq psql; do
  command -v "$tool" >/dev/null || cannot_judge "$tool is missing"
done
for name in HOLDFAST_LOAD_DIR HOLDFAST_URL HOLDFAST_OPERATOR_KEY DATABASE_URL; do
  [[ -n ${!name:-} ]] || cannot_judge "$name is not set"
done

SUMMARY=$HOLDFAST_LOAD_DIR/summary.json
[[ -s $SUMMARY ]] || cannot_judge "there is no $SUMMARY: did k6 finish?"
SALE=$(jq -r '.sale.id // empty' "$SUMMARY") || cannot_judge "$SUMMARY cannot be read"
[[ -n $SALE ]] || cannot_judge "the run had no sale"

export PGCONNECT_TIMEOUT=5
query() { psql "$DATABASE_URL" -XqAt -v ON_ERROR_STOP=1 -v sale="$SALE" "$@"; }

# ask PATH: what the service says. The key goes in by a file, for arguments can be read by others.
ask() {
  curl -sSf --max-time 10 -H @<(printf 'Authorization: Bearer %s\n' "$HOLDFAST_OPERATOR_KEY") "$HOLDFAST_URL$1"
}

# The live counters, by SKU.
live_stock() { ask "/v1/sales/$SALE/stock" | jq -cS '.skus | map({(.sku): .}) | add'; }

# The work list of refunds, page by page: how many are due and settled.
listed_refunds() {
  local path="/v1/refunds?sale_id=$SALE&limit=200" page cursor=''
  while :; do
    page=$(ask "$path$cursor") || return 1
    jq -c '.refunds[].status' <<<"$page" || return 1
    cursor=$(jq -r '.next_cursor // empty | "&cursor=" + @uri' <<<"$page") || return 1
    [[ -n $cursor ]] || return 0
  done | jq -cs '{due: map(select(. == "due")) | length, settled: map(select(. == "settled")) | length}'
}

is_ready() { curl -sSf --max-time 5 "$HOLDFAST_URL/readyz" 2>/dev/null | jq -e '.status == "ready"' >/dev/null; }

# What moves while anything is still recorded.
progress() {
  query <<'SQL'
SELECT coalesce(json_agg(json_build_array(lane, epoch, recorded) ORDER BY lane), '[]')
FROM lanes WHERE sale_id = :'sale';
SQL
}

# One look at all of it, taken as one where live stock and marks were the same before and after.
look() {
  local before after
  before=$(live_stock) && before+=$(progress) || return 1
  query -f "$HERE/lib/books.sql" >"$WORK/database.json" || return 1
  listed_refunds >"$WORK/refunds.json" || return 1
  live_stock >"$WORK/stock.json" || return 1
  after=$(cat "$WORK/stock.json") && after+=$(progress) || return 1
  SEEN=$after
  [[ $before == "$after" ]] || return 1
  jq -n --slurpfile summary "$SUMMARY" --slurpfile stock "$WORK/stock.json" \
    --slurpfile refunds "$WORK/refunds.json" --slurpfile database "$WORK/database.json" \
    '{summary: $summary[0], stock: $stock[0], refunds: $refunds[0], database: $database[0]}' |
    jq -f "$HERE/lib/books.jq" >"$WORK/books.json" 2>&3 || cannot_judge "what was found cannot be compared"
}

tell() {
  local width
  printf '\nBooks of sale %s\n\n' "$SALE"
  width=$(jq -r '[.rows[].what | length] | max + 2' "$WORK/books.json")
  printf "%-${width}s %14s %10s %10s %10s %10s\n" '' k6 live counters ledger records
  # Not a tab: bash takes several of those as one, and columns may be empty.
  jq -r '.rows[] | [.what] + .columns + [if .balanced then "" else "  <- differs" end] | join("\u001f")' \
    "$WORK/books.json" |
    while IFS=$'\x1f' read -r what k6 live counters ledger records mark; do
      printf "%-${width}s %14s %10s %10s %10s %10s%s\n" "$what" "$k6" "$live" "$counters" "$ledger" "$records" "$mark"
    done
  printf '\n'
  jq -r '.rules[] | select(.found == "unknown")
    | "not judged, for want of answers: \(.what)"' "$WORK/books.json"
}

verdict() {
  if jq -e '.balance' "$WORK/books.json" >/dev/null; then
    printf 'books balance\n'
    return 0
  fi
  printf 'the books do not balance:\n'
  jq -r '["k6", "live", "counters", "ledger", "records"] as $sources
    | (.rows[] | select(.balanced | not)
        | "  \(.what): \([[$sources, .columns] | transpose[] | select(.[1] != "") | join(" ")] | join(", "))"),
      (.rules[] | select(.balanced | not) | "  \(.what): \(.found)")' "$WORK/books.json"
  return 1
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

SEEN='' last=''
moved_at=$SECONDS
settled=false
while ((SECONDS < DEADLINE_SECONDS)); do
  looked=true
  look 2>"$WORK/trouble" || looked=false
  if [[ $SEEN != "$last" ]]; then
    last=$SEEN moved_at=$SECONDS
  fi
  still=$((SECONDS - moved_at))
  if [[ $looked == true ]]; then
    if jq -e '.balance' "$WORK/books.json" >/dev/null; then
      ((still > SETTLED_SECONDS)) && settled=true && break
    elif ((still >= STILL_SECONDS)) && is_ready; then
      settled=true && break
    fi
  fi
  sleep "$PAUSE_SECONDS" # between two looks at a condition, with a deadline
done

if [[ $settled != true ]]; then
  cat "$WORK/trouble" >&2
  [[ ! -s $WORK/books.json ]] || tell
  cannot_judge "after $DEADLINE_SECONDS s something still moves, or is away"
fi
tell
verdict
