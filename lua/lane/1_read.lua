#!lua flags=allow-oom
-- A lane's transition function: takes a batch of commands, in order of arrival, and answers each
-- exactly as if it had come alone. The files lua/lane/1_read, 2_orders, 3_stock, 4_write are one
-- script: everything that is needed is read in bulk, decided in Lua tables, and written in bulk.
--
-- KEYS  1 lane         hash    what the lane is and where it stands (fields below)
--       2 stock        hash    sku   -> "available held sold version limit initial"
--       3 buyers       hash    buyer -> "sku=units,…" held or bought, for the limits
--       4 orders       hash    key   -> "status seq created lasts confirmed hold payment reacquired
--                                          buyer lines asked returned notes", see decode_order
--       5 deadlines    zset    keys of orders that fall due together, joined, by due time (ms)
--       6 outbox       stream  one entry a call, id "epoch-lastseq": at, then (kind, payload) an event
--       7 adjustments  hash    key   -> "seq at sku delta total available held sold version undoes
--                                        undone_by actor reason reference note"; the counters are
--                                        those before; total: the one asked for; undoes, undone_by:
--                                        ids; reference, note: JSON without spaces
-- ARGV  1 the caller's clock (ms); 2 most events that may wait in the outbox; 3 "1" where Redis is
--       nearly full; 4 empty, or where the caller has a WAIT follow: the highest "epoch-seq" that it
--       knows every replica to have; 5 the highest "epoch-seq" that the caller has seen of the lane, or
--       empty; 6 the number of commands; then the commands, each as its reader below says.
-- Reply { "now epoch seq logged recorded proven", replies }; epoch 0: no such lane. A reply a command
--       and line: an outcome's name, then what belongs to it, separated by spaces. A lane that is not
--       there says "missing", one that is frozen "frozen WHY" to each.
--
-- Atomic: Redis runs a script alone, and Lua has no roll-back, so nothing is written before every
-- key that will be written has been read (a wrong type raises there), and the first write is the
-- outbox append, which raises if its id does not follow. Whatever raises has changed nothing.
-- Idempotent: an order's key is the hash of who asked and its idempotency key; every command finds
-- what an earlier copy of it did.
-- Statuses in a record: h held, p paying, c confirmed, r returned, x cancelled, e expired. An
-- absent value is empty.
-- `allow-oom`: what settles and trims must go on at maxmemory; new orders are stopped by ARGV 3.
--
-- What most calls carry are new orders, and often one alone. So what only other commands need, their
-- readers and deciders above all, is made when one of them comes: to make a function or a table costs
-- about as much as a step of an order.

-- Globals are looked up by name each time.
local KEYS, ARGV, redis, string, table, math = KEYS, ARGV, redis, string, table, math
local assert, ipairs, next, pairs, tonumber, type, unpack = assert, ipairs, next, pairs, tonumber, type, unpack

local KEY_CHARS = 22

-- tostring() would write large numbers in scientific notation, and "%.0f" takes twice as long.
local function text(number)
  return string.format('%d', number)
end

-- Of a text that may be absent. Arithmetic turns a text into a number, and sooner than tonumber() does.
local function number_or_nil(value)
  return value and value ~= '' and value + 0 or nil
end

-- What the bulk reads must fetch. A field that is in there twice does no harm.
local skus, sku_is_wanted = {}, {}
local buyer_ids, buyer_count = {}, 0
local order_keys, order_count = {}, 0
local adjustment_keys, want_all_stock, expire_max = nil, false, 0
-- Orders that a command of this call may sell again or take back: their stock must be read too.
local may_move
local function want_sku(sku)
  if not sku_is_wanted[sku] then
    sku_is_wanted[sku] = true
    skus[#skus + 1] = sku
  end
end

-- "sku=units,sku=units" -> { {sku, units}, … }, which nobody changes: in a sale most orders ask for
-- the same, and share it.
local lists = {}
local function split_lines(lines)
  if lists[lines] then
    return lists[lines]
  end
  local list, length = {}, 0
  for sku, units in string.gmatch(lines, '([^=,]+)=(%d+)') do
    list[#list + 1] = { sku = sku, units = tonumber(units) }
    length = length + #sku + #units + 2
  end
  -- What was skipped would be stock that nobody holds, or a limit that is forgotten.
  assert(length == (lines == '' and 0 or #lines + 1), 'lines cannot be read')
  lists[lines] = list
  return list
end

-- Readers of commands other than orders: each takes the index of its first argument, notes what must be
-- read for it, and returns the command and how many arguments it took.
local function other_readers()
  adjustment_keys, may_move = {}, {}
  local function want_order(key)
    order_count = order_count + 1
    order_keys[order_count] = key
  end
  local function want_adjustment(key)
    adjustment_keys[#adjustment_keys + 1] = key
  end
  return {
    -- trace key payment
    begin = function(i)
      want_order(ARGV[i + 1])
      return { trace = ARGV[i], key = ARGV[i + 1], payment = ARGV[i + 2] }, 3
    end,
    -- trace cause key payment; cause: c caller, w webhook
    fail = function(i)
      want_order(ARGV[i + 2])
      return { trace = ARGV[i], cause = ARGV[i + 1], key = ARGV[i + 2], payment = ARGV[i + 3] }, 4
    end,
    -- trace cause key payment lines; lines: what is bought, or empty for all
    confirm = function(i)
      want_order(ARGV[i + 2])
      may_move[ARGV[i + 2]] = true
      return {
        trace = ARGV[i], cause = ARGV[i + 1], key = ARGV[i + 2], payment = ARGV[i + 3], lines = ARGV[i + 4],
      }, 5
    end,
    -- trace key idempotency-key restock lines; restock: 1 or 0; lines: what comes back, or empty for
    -- all that is left
    ['return'] = function(i)
      want_order(ARGV[i + 1])
      may_move[ARGV[i + 1]] = true
      return {
        trace = ARGV[i], key = ARGV[i + 1], idempotency = ARGV[i + 2], restock = ARGV[i + 3], lines = ARGV[i + 4],
      }, 5
    end,
    -- trace key buyer reason; a buyer means: by idempotency key, leave a tombstone where there is
    -- no order. reason: JSON or empty
    cancel = function(i)
      want_order(ARGV[i + 1])
      return { trace = ARGV[i], key = ARGV[i + 1], buyer = ARGV[i + 2], reason = ARGV[i + 3] }, 4
    end,
    -- max: how many overdue holds to look for; those of one member end together
    expire = function(i)
      expire_max = math.max(expire_max, tonumber(ARGV[i]))
      return {}, 1
    end,
    -- key
    get = function(i)
      want_order(ARGV[i])
      return { key = ARGV[i] }, 1
    end,
    stock = function()
      want_all_stock = true
      return {}, 0
    end,
    -- sku delta total if_version; delta or total is empty; if_version: empty, * (any), or ",7,9,"
    preview = function(i)
      want_sku(ARGV[i])
      return {
        sku = ARGV[i], delta = ARGV[i + 1], total = ARGV[i + 2], if_version = ARGV[i + 3],
      }, 4
    end,
    -- trace key sku delta total if_version actor reason reference note, as above and in the record
    adjust = function(i)
      want_adjustment(ARGV[i + 1])
      want_sku(ARGV[i + 2])
      return {
        trace = ARGV[i], key = ARGV[i + 1], sku = ARGV[i + 2], delta = ARGV[i + 3],
        total = ARGV[i + 4], if_version = ARGV[i + 5], actor = ARGV[i + 6], reason = ARGV[i + 7],
        reference = ARGV[i + 8], note = ARGV[i + 9],
      }, 10
    end,
    -- trace key id undoes_key undoes actor note; key and id: of the new adjustment, undoes: the other
    undo = function(i)
      want_adjustment(ARGV[i + 1])
      want_adjustment(ARGV[i + 3])
      return {
        trace = ARGV[i], key = ARGV[i + 1], id = ARGV[i + 2], undoes_key = ARGV[i + 3],
        undoes = ARGV[i + 4], actor = ARGV[i + 5], note = ARGV[i + 6],
      }, 7
    end,
    -- trace version epoch digest opens closes hold grace longest limit actor definition n
    -- (sku stock limit)*n; grace: payment_grace_seconds, longest: max_hold_seconds
    -- epoch: of the lane to create, or empty where it must be there already; definition: JSON
    define = function(i)
      want_all_stock = true
      local command = {
        trace = ARGV[i], version = tonumber(ARGV[i + 1]), epoch = ARGV[i + 2], digest = ARGV[i + 3],
        opens = ARGV[i + 4], closes = ARGV[i + 5], hold = ARGV[i + 6], grace = ARGV[i + 7],
        longest = ARGV[i + 8], limit = ARGV[i + 9], actor = ARGV[i + 10], definition = ARGV[i + 11], skus = {},
      }
      local count = tonumber(ARGV[i + 12])
      for n = 1, count do
        local at = i + 10 + 3 * n
        command.skus[n] = { sku = ARGV[at], stock = tonumber(ARGV[at + 1]), limit = ARGV[at + 2] }
      end
      return command, 13 + 3 * count
    end,
    -- trace actor change; change: pause, resume or close
    phase = function(i)
      return { trace = ARGV[i], actor = ARGV[i + 1], change = ARGV[i + 2] }, 3
    end,
    -- retention in ms
    archive = function(i)
      want_all_stock = true
      return { retention = tonumber(ARGV[i]) }, 1
    end,
    -- where the lane stands, which every reply says
    marks = function()
      return {}, 0
    end,
  }
end

local caller_now = tonumber(ARGV[1])
local outbox_max = tonumber(ARGV[2])
local redis_nearly_full = ARGV[3] == '1'
local proves = ARGV[4] ~= ''

-- The n-th command begins at ARGV[places[n]]; what a reader made of it is commands[n]. Of an order, what
-- it shares with those before and behind it begins at ARGV[shared[n]].
local places, shared, commands, command_count = {}, {}, nil, tonumber(ARGV[6])
do
  local at, n, readers = 7, 0, nil
  while n < command_count do
    if ARGV[at] == 'reserve' then
      -- hold lines count (trace key buyer)*count; hold in seconds, or empty for the sale's
      local lines = ARGV[at + 2]
      if not lists[lines] then -- else other orders of this call have asked for them
        for _, line in ipairs(split_lines(lines)) do
          want_sku(line.sku)
        end
      end
      local first, count = at + 4, tonumber(ARGV[at + 3])
      for place = first, first + 3 * count - 1, 3 do
        n, order_count, buyer_count = n + 1, order_count + 1, buyer_count + 1
        places[n], shared[n] = place, at
        order_keys[order_count], buyer_ids[buyer_count] = ARGV[place + 1], ARGV[place + 2]
      end
      at = first + 3 * count
    else
      readers, commands = readers or other_readers(), commands or {}
      n = n + 1
      local command, taken = readers[ARGV[at]](at + 1)
      places[n], commands[n] = at, command
      at = at + 1 + taken
    end
  end
  assert(at == #ARGV + 1, 'the commands do not fill ARGV')
end

-- The lane itself: its fields, absent ones nil or empty; read all at once, since to look each up by name
-- in Redis costs more, into a table that has room for them. What is not turned into a number here remains
-- a text. run: the run_id of the server that it was opened on; frozen: why it must not be used (run,
-- behind, rebuild, operator), or empty; since: for recovery, the seq after which its present epoch began.
local lane = {
  layout = nil, epoch = nil, seq = nil, logged = nil, recorded = nil, trimmed = nil, now = nil, version = nil,
  digest = nil, opens = nil, closes = nil, hold = nil, grace = nil, longest = nil, limit = nil, paused = nil,
  closed = nil, archived = nil, used = nil, proven = nil, run = nil, frozen = nil, since = nil,
  relay = nil, leased = nil, exists = nil,
}
do
  local found = redis.call('HGETALL', KEYS[1])
  for i = 1, #found, 2 do
    lane[found[i]] = found[i + 1]
  end
  lane.exists = lane.layout and true
  if lane.exists and lane.layout ~= '2' then
    return redis.error_reply('HOLDFAST this lane has layout ' .. lane.layout .. ', this script knows 2')
  end
  lane.epoch = lane.epoch or '0'
  lane.seq, lane.trimmed, lane.now = (lane.seq or 0) + 0, (lane.trimmed or 0) + 0, (lane.now or 0) + 0
  lane.logged, lane.recorded = lane.logged or '0', lane.recorded or '0'
  lane.opens, lane.closes = number_or_nil(lane.opens), number_or_nil(lane.closes)
  lane.closed = number_or_nil(lane.closed)
  lane.hold, lane.limit = number_or_nil(lane.hold), number_or_nil(lane.limit)
  lane.paused, lane.archived, lane.used = lane.paused == '1', lane.archived == '1', lane.used == '1'
  if lane.proven or proves then
    -- Up to where every replica was seen to have the lane. What another epoch had is not this one's.
    local function proven_by(mark)
      local epoch, seq = string.match(mark or '', '^(%d+)-(%d+)$')
      return epoch == lane.epoch and tonumber(seq) <= lane.seq and tonumber(seq) or 0
    end
    lane.proven = math.max(proven_by(lane.proven), proven_by(ARGV[4]))
  else
    lane.proven = 0
  end
end

-- The lane's time never goes back, whatever Redis' clock does.
local now, now_text
do
  local time = redis.call('TIME')
  now = math.max(time[1] * 1000 + math.floor(time[2] / 1000), lane.now)
  now_text = text(now)
end

-- Where the lane stands, as every reply begins.
local function stands(seq)
  local proven = lane.proven > 0 and text(lane.proven) or '0'
  return now_text .. ' ' .. lane.epoch .. ' ' .. seq .. ' ' .. lane.logged .. ' ' .. lane.recorded .. ' ' .. proven
end

-- A lane on another run of a server than the one it was opened on, or below what its caller has seen of
-- it, may have forgotten what it answered. It must not sell those units again: it is frozen, for all
-- callers, until recovery has opened it. An older version made lanes without `run`: they get it with
-- their next event.
local run
do
  local server = redis.call('INFO', 'server')
  -- To find a text costs less than to look for a pattern.
  run = string.match(server, '^run_id:(%x+)', string.find(server, 'run_id:', 1, true) or 1)
  assert(run, 'the server does not say which run it is')
end
if lane.exists then
  local why = lane.frozen
  if not why or why == '' then
    local epoch, seq = string.match(ARGV[5], '^(%d+)-(%d+)$')
    local ahead = (epoch or 0) - lane.epoch
    if lane.run and lane.run ~= run then
      why = 'run'
    elseif ahead > 0 or (ahead == 0 and (seq or 0) + 0 > lane.seq) then
      why = 'behind'
    else
      why = nil
    end
    if why then
      redis.call('HSET', KEYS[1], 'frozen', why)
    end
  end
  if why then
    local replies = {}
    for n = 1, command_count do
      replies[n] = 'frozen ' .. why
    end
    return { stands(text(lane.seq)), table.concat(replies, '\n') }
  end
end

-- What is due, on both clocks: releasing a hold is the one irreversible use of time.
local due_members, due_keys, due_more, next_deadline
if expire_max > 0 and lane.exists then
  due_members, due_keys = {}, {}
  local page, done = 16, false
  while not done do
    local found = redis.call('ZRANGE', KEYS[5], #due_members, #due_members + page - 1, 'WITHSCORES')
    done = #found < 2 * page
    for i = 1, #found, 2 do
      local score = tonumber(found[i + 1])
      if score > math.min(now, caller_now) then
        next_deadline, done = score, true
        break
      end
      if #due_keys >= expire_max then
        due_more, done = true, true
        break
      end
      due_members[#due_members + 1] = found[i]
      for at = 1, #found[i], KEY_CHARS do
        local key = string.sub(found[i], at, at + KEY_CHARS - 1)
        due_keys[#due_keys + 1] = key
        order_count = order_count + 1
        order_keys[order_count] = key
      end
    end
  end
end

-- created: a time (ms); lasts: the deadline, in ms after it. lines: what it holds, bought or held last; asked: what was asked for, where that is more;
-- returned: what came back. notes, separated by spaces, are what must be remembered of an order
-- beside its state: "l:PAYMENT" and the like a refund that is due (see refund_due), "r:KEY:RESTOCK:LINES"
-- a return as it was asked for.
local function decode_order(key, record)
  local status, seq, created, lasts, confirmed, hold, payment, reacquired, buyer, lines, asked, returned, notes =
    string.match(record, '^(%a) (%d+) (%d+) (%d+) (%d*) (%d*) ([^ ]*) (1?) ([^ ]*) ([^ ]*) ([^ ]*) ([^ ]*) (.*)$')
  assert(status, 'the record of an order cannot be read')
  return {
    key = key, record = record, status = status, seq = seq, created = tonumber(created),
    expires = tonumber(created) + tonumber(lasts),
    confirmed = confirmed, hold = hold, payment = payment, reacquired = reacquired, buyer = buyer, lines = lines,
    asked = asked, returned = returned, notes = notes,
  }
end

-- key -> the order; of one that this call has just held its record, until somebody wants more.
local orders = {}

local function order_of(key)
  local order = orders[key]
  if type(order) == 'string' then
    order = decode_order(key, order)
    order.list = split_lines(order.lines)
    orders[key] = order
  end
  return order
end

if order_count > 0 then
  local found = redis.call('HMGET', KEYS[4], unpack(order_keys))
  for i = 1, order_count do
    if found[i] then
      local key = order_keys[i]
      local order = decode_order(key, found[i])
      orders[key] = order
      -- Settling a hold moves its stock and, where it is released, its buyer's count.
      if order.status == 'h' or order.status == 'p' or (commands and may_move[key]) then
        order.list = split_lines(order.lines)
        buyer_count = buyer_count + 1
        buyer_ids[buyer_count] = order.buyer
        for _, line in ipairs(order.list) do
          want_sku(line.sku)
        end
      end
    end
  end
end

local adjustments = {}
if commands and #adjustment_keys > 0 then
  local function decode(key, record)
    local seq, at, sku, delta, total, before, undoes, undone_by, actor, reason, reference, note = string.match(
      record,
      '^(%d+) (%d+) ([^ ]+) (%-?%d+) (%d*) (%d+ %d+ %d+ %d+) ([^ ]*) ([^ ]*) ([^ ]+) (%a+) ([^ ]*) ([^ ]*)$'
    )
    assert(seq, 'the record of an adjustment cannot be read')
    return {
      key = key, seq = seq, at = at, sku = sku, delta = delta, total = total, before = before, undoes = undoes,
      undone_by = undone_by, actor = actor, reason = reason, reference = reference, note = note,
    }
  end
  local found = redis.call('HMGET', KEYS[7], unpack(adjustment_keys))
  for i, key in ipairs(adjustment_keys) do
    if found[i] then
      adjustments[key] = decode(key, found[i])
      want_sku(adjustments[key].sku) -- whose units an undo moves back
    end
  end
end

-- sku -> its counters; `rest` is "version limit initial", for the commands that only move units.
local stock = {}
do
  local function read_counters(sku, value)
    local available, held, sold, rest, version, limit, initial =
      string.match(value, '^(%d+) (%d+) (%d+) ((%d+) (%d*) (%d+))$')
    assert(available, 'the counters of an SKU cannot be read')
    stock[sku] = {
      available = available + 0, held = held + 0, sold = sold + 0, rest = rest,
      version = version, limit = number_or_nil(limit), initial = initial,
    }
  end
  if want_all_stock then
    local all = redis.call('HGETALL', KEYS[2])
    for i = 1, #all, 2 do
      read_counters(all[i], all[i + 1])
    end
  elseif #skus > 0 then
    local found = redis.call('HMGET', KEYS[2], unpack(skus))
    for i, sku in ipairs(skus) do
      if found[i] then
        read_counters(sku, found[i])
      end
    end
  end
end

-- buyer -> "sku=units,…", as Redis has it; nil or empty: nothing.
local buyers = {}
if buyer_count > 0 then
  local found = redis.call('HMGET', KEYS[3], unpack(buyer_ids))
  for i = 1, buyer_count do
    if found[i] then
      buyers[buyer_ids[i]] = found[i]
    end
  end
end

-- What the decisions below leave for the bulk writes. Of a key that is in there twice the last counts.
local events, event_words = {}, 0
local order_writes, order_words = {}, 0
local buyer_writes, buyer_words = {}, 0
local emptied -- buyers that may have nothing any more
local changed = { stock = {}, lane = {}, gone = nil, adjustments = nil }
if commands then
  changed.gone, changed.adjustments, emptied = {}, {}, {}
end
local deadlines = {} -- time, as a text -> keys of the orders that the sweeper is to look at then

local last_seq = lane.seq -- and of the events so far
local function emit(kind, payload)
  last_seq = last_seq + 1
  events[event_words + 1] = kind
  events[event_words + 2] = payload
  event_words = event_words + 2
end
