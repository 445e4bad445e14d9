
-- Orders: reserve, confirm, cancel, expire, get.

local decide = {}

-- An order's record: as it was read, until the next step makes another.
local function record(order)
  order.record = order.record or table.concat({
    order.status, order.seq, order.created, text(order.expires), order.confirmed, order.hold,
    order.payment, order.buyer, order.lines,
  }, ' ')
  return order.record
end

-- Gives the order its next status, as one event. cause: c caller, s sweeper.
local function step(order, kind, status, cause, trace, reason)
  local from = order.status or '-'
  order.status, order.record = status, nil
  order.seq = text(lane.seq + 1)
  changed.orders[order.key] = order
  emit(kind, table.concat({ order.key, from, cause, trace, record(order), reason or '' }, ' '))
end

local function sku_of(line)
  local counters = stock[line.sku]
  assert(counters, 'an order names an SKU that the lane does not have')
  changed.stock[line.sku] = counters
  return counters
end

-- Moves a hold's units from held to `to`, and from its buyer's count where they go back on sale.
local function settle(order, to)
  local buyer = buyers[order.buyer]
  for _, line in ipairs(order.list) do
    local counters = sku_of(line)
    assert(counters.held >= line.units, 'less is held than an order holds')
    counters.held = counters.held - line.units
    counters[to] = counters[to] + line.units
    if to == 'available' then
      buyer.units[line.sku] = (buyer.units[line.sku] or 0) - line.units
      buyer.total = buyer.total - line.units
      changed.buyers[order.buyer] = buyer
    end
  end
end

local function sorted_lines(list)
  local parts = {}
  for i, line in ipairs(list) do
    parts[i] = line.sku .. '=' .. text(line.units)
  end
  table.sort(parts)
  return table.concat(parts, ',')
end

local function same_meaning(order, command)
  return order.hold == command.hold
    and (order.lines == command.lines or sorted_lines(split_lines(order.lines)) == sorted_lines(command.list))
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
    local limit, already = stock[line.sku].limit, buyer.units[line.sku] or 0
    if limit and already + line.units > limit then
      return 'purchase-limit ' .. text(limit) .. ' ' .. text(already) .. ' ' .. line.sku
    end
    asked = asked + line.units
  end
  if lane.limit and buyer.total + asked > lane.limit then
    return 'purchase-limit ' .. text(lane.limit) .. ' ' .. text(buyer.total) .. ' '
  end
end

local function refused_by_stock(list)
  local short = {}
  for _, line in ipairs(list) do
    local available = stock[line.sku].available
    if available < line.units then
      short[#short + 1] = line.sku .. '=' .. text(line.units) .. '=' .. text(available)
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

-- Outcomes: held, replayed (both with the record), reused, overloaded, archived, closed,
-- not-open OPENS, paused, unknown-sku SKU, hold-too-long MAX, purchase-limit LIMIT ALREADY SKU,
-- sold-out SKU=ASKED=AVAILABLE,…
function decide.reserve(command)
  local order = orders[command.key]
  if order then
    -- A tombstone answers whatever the body: the order was cancelled before it came.
    if order.lines == '' or same_meaning(order, command) then
      return 'replayed ' .. record(order)
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

  order = {
    key = command.key, created = text(now), expires = now + hold * 1000, confirmed = '',
    hold = command.hold, payment = '', buyer = command.buyer, lines = command.lines, list = command.list,
  }
  for _, line in ipairs(order.list) do
    local counters = sku_of(line)
    counters.available = counters.available - line.units
    counters.held = counters.held + line.units
    buyer.units[line.sku] = (buyer.units[line.sku] or 0) + line.units
    buyer.total = buyer.total + line.units
  end
  changed.buyers[order.buyer] = buyer
  changed.lane.used = '1'
  lane.used = true
  orders[order.key] = order
  deadlines[order.expires] = (deadlines[order.expires] or '') .. order.key
  step(order, 'held', 'h', 'c', command.trace)
  return 'held ' .. record(order)
end

-- Outcomes, each but the first with the record: unknown, confirmed, same (it has this payment),
-- already-paid, cancelled, too-late.
function decide.confirm(command)
  local order = orders[command.key]
  if not order then
    return 'unknown'
  elseif order.status == 'c' then
    return (order.payment == command.payment and 'same ' or 'already-paid ') .. record(order)
  elseif order.status == 'x' then
    return 'cancelled ' .. record(order)
  elseif order.status == 'e' or now >= order.expires then
    return 'too-late ' .. record(order)
  end
  settle(order, 'sold')
  order.payment, order.confirmed = command.payment, text(now)
  step(order, 'confirmed', 'c', 'c', command.trace)
  return 'confirmed ' .. record(order)
end

-- Outcomes: unknown, archived, overloaded (for a tombstone); with the record: cancelled, same (it was cancelled before),
-- confirmed (and stays so).
function decide.cancel(command)
  local order = orders[command.key]
  if order and order.status == 'x' then
    return 'same ' .. record(order)
  elseif order and order.status == 'c' then
    return 'confirmed ' .. record(order)
  elseif not order and command.buyer == '' then
    return 'unknown'
  elseif lane.archived then
    return 'archived'
  elseif not order and no_room() then
    return 'overloaded'
  end
  if not order then
    order = {
      key = command.key, created = text(now), expires = now, confirmed = '', hold = '', payment = '',
      buyer = command.buyer, lines = '',
    }
    orders[order.key] = order
    changed.lane.used = '1'
    lane.used = true
  elseif order.status == 'h' then
    settle(order, 'available')
  end
  step(order, 'cancelled', 'x', 'c', command.trace, command.reason)
  return 'cancelled ' .. record(order)
end

-- Outcome: expired HOW-MANY FIRST MORE NEXT; FIRST is the earliest deadline (ms) of those it ended, or
-- empty; MORE is 1 where more is due, else NEXT is the next deadline, or empty. The one look at the
-- deadlines serves all such commands of a call.
function decide.expire()
  local ended, first = 0, nil
  for _, key in ipairs(due_keys) do
    local order = orders[key]
    -- Paid or cancelled since, or ended by the command before: its deadline no longer matters.
    if order and order.status == 'h' and order.expires <= math.min(now, caller_now) then
      settle(order, 'available')
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
  local order = orders[command.key]
  return order and ('order ' .. record(order)) or 'unknown'
end
