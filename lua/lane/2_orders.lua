
-- Orders: reserve, begin, fail, confirm, cancel, return, expire, get.

-- Payments and returns that are remembered of one order at most.
local NOTES_MAX = 64

local decide = {}

-- Short and varied: beyond 31 characters Lua hashes only some of a string's, and strings that are
-- all alike there are slow to make.
local function encode_order(order)
  return order.status .. ' ' .. order.seq .. ' ' .. usual_text(order.created) .. ' '
    .. usual_text(order.expires - order.created) .. ' ' .. order.confirmed .. ' ' .. order.hold .. ' '
    .. order.payment .. ' ' .. order.reacquired .. ' ' .. order.buyer .. ' ' .. order.lines .. ' '
    .. order.asked .. ' ' .. order.returned .. ' ' .. order.notes
end

local NO_MORE = {}

-- Gives the order its next status, as one event, and its new record. cause: c caller, w webhook, s sweeper. moved:
-- lines that move otherwise than the order's own do; about: what else the event says.
local function step(order, kind, status, cause, trace, more)
  more = more or NO_MORE
  local from = order.status or '-'
  order.status, order.seq = status, text(lane.seq + 1)
  order.record = encode_order(order)
  changed.orders[order.key] = order.record
  emit(kind, order.key .. ' ' .. from .. ' ' .. cause .. ' ' .. trace .. ' ' .. (more.moved or '') .. ' '
    .. (more.about or '') .. ' ' .. (more.reason or '') .. ' ' .. order.record)
end

local function sku_of(line)
  local counters = stock[line.sku]
  assert(counters, 'an order names an SKU that the lane does not have')
  changed.stock[line.sku] = counters
  return counters
end

-- Moves units of an order's lines between counters; nil: from nowhere, or out of the total.
local function move_units(list, from, to)
  for _, line in ipairs(list) do
    local counters = sku_of(line)
    if from then
      assert(counters[from] >= line.units, 'fewer units are there than an order has')
      counters[from] = counters[from] - line.units
    end
    if to then
      counters[to] = counters[to] + line.units
    end
  end
end

-- Counts units for or, by -1, against the buyer's limits.
local function count_units(buyer, list, sign)
  local count = buyers[buyer]
  for _, line in ipairs(list) do
    count[line.sku] = (count[line.sku] or 0) + sign * line.units
    count[1] = count[1] + sign * line.units
  end
  changed.buyers[buyer] = count
end

-- Puts what an order holds back on sale.
local function release(order, list)
  move_units(list, 'held', 'available')
  count_units(order.buyer, list, -1)
end

local function encode_lines(list)
  local parts = {}
  for i, line in ipairs(list) do
    parts[i] = line.sku .. '=' .. usual_text(line.units)
  end
  return parts
end

local function sorted_lines(list)
  local parts = encode_lines(list)
  table.sort(parts)
  return table.concat(parts, ',')
end

-- What is left of one list when another is taken out of it; nil where that is no part of it.
local function without(list, taken)
  local left, units = {}, {}
  for _, line in ipairs(taken) do
    units[line.sku] = line.units
  end
  for _, line in ipairs(list) do
    local rest = line.units - (units[line.sku] or 0)
    units[line.sku] = nil
    if rest < 0 then
      return nil
    elseif rest > 0 then
      left[#left + 1] = { sku = line.sku, units = rest }
    end
  end
  if next(units) then
    return nil
  end
  return left
end

-- Has the sweeper look at the order at its deadline.
local function fall_due(key, expires)
  local keys = deadlines[expires] or {}
  keys[#keys + 1] = key
  deadlines[expires] = keys
end

-- Whether the order still has the time that it was promised.
local function in_time(order)
  return (order.status == 'h' or order.status == 'p') and now < order.expires
end

local function same_meaning(order, command)
  local asked = order.asked ~= '' and order.asked or order.lines
  return order.hold == command.hold
    and (asked == command.lines or sorted_lines(split_lines(asked)) == sorted_lines(command.list))
end

local function refused_by_phase()
  if lane.archived then
    return 'archived'
  elseif lane.closed or (lane.closes and now >= lane.closes) then
    return 'closed'
  elseif lane.opens and now < lane.opens then
    return 'not-open ' .. text(lane.opens)
  elseif lane.paused then
    return 'paused'
  end
end

local function refused_by_limit(buyer, list)
  local asked = 0
  for _, line in ipairs(list) do
    local limit, already = stock[line.sku].limit, buyer[line.sku] or 0
    if limit and already + line.units > limit then
      return 'purchase-limit ' .. text(limit) .. ' ' .. text(already) .. ' ' .. line.sku
    end
    asked = asked + line.units
  end
  if lane.limit and buyer[1] + asked > lane.limit then
    return 'purchase-limit ' .. text(lane.limit) .. ' ' .. text(buyer[1]) .. ' '
  end
end

local function refused_by_stock(list)
  local short = {}
  for _, line in ipairs(list) do
    local available = stock[line.sku].available
    if available < line.units then
      short[#short + 1] = line.sku .. '=' .. usual_text(line.units) .. '=' .. usual_text(available)
    end
  end
  if #short > 0 then
    return 'sold-out ' .. table.concat(short, ',')
  end
end

-- Whether new orders must wait: settling old ones never does.
local function no_room()
  return redis_nearly_full or lane.seq - lane.trimmed >= outbox_max
end

-- Outcomes: held SEQ EXPIRES, replayed (with the record), reused, overloaded, archived, closed,
-- not-open OPENS, paused, unknown-sku SKU, hold-too-long MAX, purchase-limit LIMIT ALREADY SKU,
-- sold-out SKU=ASKED=AVAILABLE,…
function decide.reserve(command)
  local order = order_of(command.key)
  if order then
    -- A tombstone answers whatever the body: the order was cancelled before it came.
    if order.lines == '' or same_meaning(order, command) then
      return 'replayed ' .. order.record
    end
    return 'reused'
  end
  if no_room() then
    return 'overloaded'
  end
  local refusal = refused_by_phase()
  if refusal then
    return refusal
  end
  for _, line in ipairs(command.list) do
    if not stock[line.sku] then
      return 'unknown-sku ' .. line.sku
    end
  end
  local hold = tonumber(command.hold ~= '' and command.hold or lane.hold)
  if hold > lane.hold then
    return 'hold-too-long ' .. text(lane.hold)
  end
  local buyer = buyers[command.buyer]
  refusal = refused_by_limit(buyer, command.list) or refused_by_stock(command.list)
  if refusal then
    return refusal
  end

  -- What encode_order and step would make of it, at once: most of a sale's commands end here.
  local seq, expires = text(lane.seq + 1), now + hold * 1000
  local record = 'h ' .. seq .. ' ' .. usual_text(now) .. ' ' .. usual_text(hold * 1000) .. '  ' .. command.hold
    .. '   ' .. command.buyer .. ' ' .. command.lines .. '   '
  move_units(command.list, 'available', 'held')
  count_units(command.buyer, command.list, 1)
  fall_due(command.key, expires)
  changed.lane.used = '1'
  lane.used = true
  orders[command.key], changed.orders[command.key] = record, record
  emit('held', command.key .. ' - c ' .. command.trace .. '    ' .. record)
  return 'held ' .. seq .. ' ' .. usual_text(expires)
end

-- An order that was over before it came: whoever places it later is told so.
local function tombstone(key, buyer)
  local order = {
    key = key, created = now, expires = now, confirmed = '', hold = '', payment = '', reacquired = '',
    buyer = buyer, lines = '', asked = '', returned = '', notes = '', list = {},
  }
  orders[key] = order
  changed.lane.used = '1'
  lane.used = true
  return order
end

-- Adds a note; false where there is no room for another.
local function note(order, words)
  local count = select(2, string.gsub(order.notes, '%S+', ''))
  if count >= NOTES_MAX then
    return false
  end
  order.notes = order.notes == '' and words or (order.notes .. ' ' .. words)
  return true
end

-- Why this payment of this order must be given back, where that was said before: it is final.
local function refund_of(order, payment)
  for entry in string.gmatch(order.notes, '%S+') do
    local why, known = string.match(entry, '^([lxam]):(.+)$')
    if known == payment then
      return 'refund ' .. why .. ' ' .. order.record
    end
  end
end

-- Says that a payment must be given back. why: l late, x the order was cancelled, a another payment
-- bought it, m its lines are no part of the order.
local function refund_due(order, command, why)
  if not note(order, why .. ':' .. command.payment) then
    return 'overloaded'
  end
  step(order, 'refund_due', order.status, command.cause, command.trace, { about = why .. ':' .. command.payment })
  return 'refund ' .. why .. ' ' .. order.record
end

-- Outcomes: unknown, refund WHY; with the record: begun, same (this payment runs), over (it is
-- neither held nor being paid any more).
function decide.begin(command)
  local order = order_of(command.key)
  if not order then
    return 'unknown'
  end
  local refund = refund_of(order, command.payment)
  if refund then
    return refund
  elseif not in_time(order) then
    return 'over ' .. order.record
  elseif order.payment == command.payment then
    return 'same ' .. order.record
  end
  local longest = math.min(now + lane.grace * 1000, order.created + lane.longest * 1000)
  if longest > order.expires then
    order.expires = longest
    fall_due(order.key, longest)
  end
  order.payment = command.payment
  step(order, 'payment_begun', 'p', 'c', command.trace)
  return 'begun ' .. order.record
end

-- Outcomes: unknown; with the record: failed, ignored (it is not this payment that runs).
function decide.fail(command)
  local order = order_of(command.key)
  if not order then
    return 'unknown'
  elseif order.status ~= 'p' or order.payment ~= command.payment or not in_time(order) then
    return 'ignored ' .. order.record
  end
  order.payment = ''
  step(order, 'payment_failed', 'h', command.cause, command.trace)
  return 'failed ' .. order.record
end

-- Takes stock that has gone back on sale once more, if it is still there and the buyer's limits
-- allow it.
local function reacquire(order, list)
  for _, line in ipairs(list) do
    if not stock[line.sku] then
      return false
    end
  end
  if refused_by_limit(buyers[order.buyer], list) or refused_by_stock(list) then
    return false
  end
  move_units(list, 'available', 'sold')
  count_units(order.buyer, list, 1)
  return true
end

-- Outcomes: archived, overloaded, not-part, refund WHY; with the record: confirmed, same (it has
-- this payment).
function decide.confirm(command)
  local order = order_of(command.key)
  local refund = order and refund_of(order, command.payment)
  if refund then
    return refund
  elseif order and (order.status == 'c' or order.status == 'r') and order.payment == command.payment then
    return 'same ' .. order.record
  elseif lane.archived then
    return 'archived'
  elseif not order then
    -- The id is genuine, so there was an order once: the money must not stay, nor come in later.
    order = tombstone(command.key, '')
    step(order, 'cancelled', 'x', command.cause, command.trace)
    return refund_due(order, command, 'x')
  elseif order.status == 'c' or order.status == 'r' then
    return refund_due(order, command, 'a')
  elseif order.status == 'x' then
    return refund_due(order, command, 'x')
  end

  local list = command.lines == '' and order.list or split_lines(command.lines)
  local rest = without(order.list, list)
  if not rest then
    return command.cause == 'w' and refund_due(order, command, 'm') or 'not-part'
  end
  local late = not in_time(order)
  local released = ''
  if order.status == 'e' then
    if not reacquire(order, list) then
      return refund_due(order, command, 'l')
    end
  else
    move_units(list, 'held', 'sold')
    release(order, rest)
    released = table.concat(encode_lines(rest), ',')
  end
  if #rest > 0 then
    order.asked = order.asked ~= '' and order.asked or order.lines
    order.lines, order.list = table.concat(encode_lines(list), ','), list
  end
  order.reacquired = late and '1' or ''
  order.payment, order.confirmed = command.payment, text(now)
  step(order, 'confirmed', 'c', command.cause, command.trace, { moved = released })
  return 'confirmed ' .. order.record
end

-- Outcomes: unknown, archived, overloaded (for a tombstone); with the record: cancelled, same (it
-- was cancelled before), sold (confirmed or returned, and stays so).
function decide.cancel(command)
  local order = order_of(command.key)
  if order and order.status == 'x' then
    return 'same ' .. order.record
  elseif order and (order.status == 'c' or order.status == 'r') then
    return 'sold ' .. order.record
  elseif not order and command.buyer == '' then
    return 'unknown'
  elseif lane.archived then
    return 'archived'
  elseif not order and no_room() then
    return 'overloaded'
  end
  if not order then
    order = tombstone(command.key, command.buyer)
  elseif order.status ~= 'e' then
    release(order, order.list)
  end
  order.payment = ''
  step(order, 'cancelled', 'x', 'c', command.trace, { reason = command.reason })
  return 'cancelled ' .. order.record
end

-- Outcomes: unknown, reused, archived, overloaded; with the record: returned, replayed, exceeds (it
-- is more than is left), over (it is not confirmed).
decide['return'] = function(command)
  local order = order_of(command.key)
  if not order then
    return 'unknown'
  end
  for entry in string.gmatch(order.notes, '%S+') do
    local key, restock, lines = string.match(entry, '^r:([^:]+):(%d):(.*)$')
    if key == command.idempotency then
      local same = restock == command.restock and sorted_lines(split_lines(lines)) == sorted_lines(split_lines(command.lines))
      return same and ('replayed ' .. order.record) or 'reused'
    end
  end
  if order.status ~= 'c' then
    return 'over ' .. order.record
  elseif lane.archived then
    return 'archived'
  end
  local left = without(order.list, split_lines(order.returned))
  local list = command.lines == '' and left or split_lines(command.lines)
  local rest = without(left, list)
  if not rest then
    return 'exceeds ' .. order.record
  elseif not note(order, 'r:' .. command.idempotency .. ':' .. command.restock .. ':' .. command.lines) then
    return 'overloaded'
  end
  move_units(list, 'sold', command.restock == '1' and 'available' or nil)
  count_units(order.buyer, list, -1)
  order.returned = table.concat(encode_lines(without(order.list, rest)), ',')
  local about = command.restock .. ':' .. command.idempotency
  step(order, 'returned', #rest == 0 and 'r' or 'c', 'c', command.trace, {
    moved = table.concat(encode_lines(list), ','), about = about,
  })
  return 'returned ' .. order.record
end

-- Outcome: expired HOW-MANY FIRST MORE NEXT; FIRST is the earliest deadline (ms) of those it ended, or
-- empty; MORE is 1 where more is due, else NEXT is the next deadline, or empty. The one look at the
-- deadlines serves all such commands of a call.
function decide.expire()
  local ended, first = 0, nil
  for _, key in ipairs(due_keys) do
    local order = order_of(key)
    local unpaid = order and (order.status == 'h' or order.status == 'p')
    -- Settled since, ended by the command before, or given more time by a payment that runs: then
    -- this deadline no longer matters.
    if unpaid and order.expires <= math.min(now, caller_now) then
      release(order, order.list)
      order.payment = ''
      step(order, 'expired', 'e', 's', '')
      ended, first = ended + 1, math.min(first or order.expires, order.expires)
    end
  end
  local expired = 'expired ' .. text(ended) .. ' ' .. (first and text(first) or '')
  if due_more then
    return expired .. ' 1 '
  end
  local soonest = next_deadline
  for at in pairs(deadlines) do -- of holds that came before in this call
    soonest = math.min(soonest or at, at)
  end
  return expired .. ' 0 ' .. (soonest and text(soonest) or '')
end

-- Outcomes: unknown, order RECORD.
function decide.get(command)
  local order = order_of(command.key)
  return order and ('order ' .. order.record) or 'unknown'
end
