
-- Orders: reserve, begin, fail, confirm, cancel, return, expire, get.

local function encode_lines(list)
  local parts = {}
  for i, line in ipairs(list) do
    parts[i] = line.sku .. '=' .. text(line.units)
  end
  return parts
end

-- A buyer's "sku=units,…" once the units of a list are counted for or, by -1, against it.
local function add_units(before, list, sign)
  local units, after = {}, {}
  for _, line in ipairs(list) do
    units[line.sku] = sign * line.units
  end
  for _, line in ipairs(split_lines(before)) do
    after[#after + 1] = { sku = line.sku, units = line.units + (units[line.sku] or 0) }
    units[line.sku] = nil
  end
  for _, line in ipairs(list) do
    after[#after + 1] = { sku = line.sku, units = units[line.sku] or 0 }
  end
  for i = #after, 1, -1 do
    if after[i].units <= 0 then
      table.remove(after, i)
    end
  end
  return table.concat(encode_lines(after), ',')
end

-- units: what the buyer has.
local function refused_by_limit(units, list)
  local held, asked = split_lines(units), 0
  for i = 1, #list do
    local line = list[i]
    local limit, already = stock[line.sku].limit, 0
    for n = 1, #held do
      if held[n].sku == line.sku then
        already = held[n].units
      end
    end
    if limit and already + line.units > limit then
      return 'purchase-limit ' .. text(limit) .. ' ' .. text(already) .. ' ' .. line.sku
    end
    asked = asked + line.units
  end
  if lane.limit then
    local already = 0
    for n = 1, #held do
      already = already + held[n].units
    end
    if already + asked > lane.limit then
      return 'purchase-limit ' .. text(lane.limit) .. ' ' .. text(already) .. ' '
    end
  end
end

local function refused_by_stock(list)
  local short
  for i = 1, #list do
    local line = list[i]
    local available = stock[line.sku].available
    if available < line.units then
      short = (short and short .. ',' or 'sold-out ') .. line.sku .. '=' .. text(line.units) .. '=' .. text(available)
    end
  end
  return short
end

-- From this seq on new orders must wait: settling old ones never does.
local full_at = redis_nearly_full and 0 or lane.trimmed + outbox_max

-- What becomes of all orders of a call that ask for the same and whose buyers have the same, as far as
-- only another command could change it: why they are refused, or what is written of them. In a sale most
-- orders are alike. plans[lines and hold][units], until such a command comes.
local plans = {}
local function make_plan(lines, hold, units)
  if lane.archived then
    return { refusal = 'archived' }
  elseif lane.closed or (lane.closes and now >= lane.closes) then
    return { refusal = 'closed' }
  elseif lane.opens and now < lane.opens then
    return { refusal = 'not-open ' .. text(lane.opens) }
  elseif lane.paused then
    return { refusal = 'paused' }
  end
  local list, moves = split_lines(lines), {}
  for n = 1, #list do
    local line = list[n]
    local counters = stock[line.sku]
    if not counters then
      return { refusal = 'unknown-sku ' .. line.sku }
    end
    moves[n] = { counters = counters, units = line.units }
  end
  local seconds = hold ~= '' and tonumber(hold) or lane.hold
  if seconds > lane.hold then
    return { refusal = 'hold-too-long ' .. text(lane.hold) }
  end
  local refusal = refused_by_limit(units, list)
  if refusal then
    return { refusal = refusal }
  end
  return {
    list = list, moves = moves, units = units == '' and lines or add_units(units, list, 1),
    expires = text(now + seconds * 1000), due = nil,
    -- What encode_order would put between seq and buyer.
    words = ' ' .. now_text .. ' ' .. text(seconds * 1000) .. '  ' .. hold .. '   ',
  }
end

local function plan_of(lines, hold, units)
  local asked = hold == '' and lines or lines .. ' ' .. hold
  local alike = plans[asked] or {}
  plans[asked] = alike
  local plan = make_plan(lines, hold, units)
  alike[units] = plan
  return plan
end

-- Notes, when the first order is held by it, what a plan changes; returns whom the sweeper is to look at.
local function begin_plan(plan)
  local list, due = plan.list, deadlines[plan.expires] or {}
  for n = 1, #list do
    changed.stock[list[n].sku] = plan.moves[n].counters
  end
  if not lane.used then
    lane.used, changed.lane.used = true, '1'
  end
  plan.due, deadlines[plan.expires] = due, due
  return due
end

local function sorted_lines(list)
  local parts = encode_lines(list)
  table.sort(parts)
  return table.concat(parts, ',')
end

local function reserve_again(order, hold, lines)
  local asked = order.asked ~= '' and order.asked or order.lines
  local same = order.hold == hold
    and (asked == lines or sorted_lines(split_lines(asked)) == sorted_lines(split_lines(lines)))
  -- A tombstone answers whatever the body: the order was cancelled before it came.
  return (same or order.lines == '') and ('replayed ' .. order.record) or 'reused'
end

-- Outcomes: held SEQ EXPIRES, replayed (with the record), reused, overloaded, archived, closed,
-- not-open OPENS, paused, unknown-sku SKU, hold-too-long MAX, purchase-limit LIMIT ALREADY SKU,
-- sold-out SKU=ASKED=AVAILABLE,…
local function reserve(at, shared_at)
  local key, buyer, hold, lines = ARGV[at + 1], ARGV[at + 2], ARGV[shared_at + 1], ARGV[shared_at + 2]
  if orders[key] then
    return reserve_again(order_of(key), hold, lines)
  elseif last_seq >= full_at then
    return 'overloaded'
  end
  local alike, units = plans[hold == '' and lines or lines .. ' ' .. hold], buyers[buyer] or ''
  local plan = alike and alike[units] or plan_of(lines, hold, units)
  if plan.refusal then
    return plan.refusal
  end
  local moves = plan.moves
  for n = 1, #moves do
    local move = moves[n]
    if move.counters.available < move.units then
      return refused_by_stock(plan.list)
    end
  end

  -- What step would do.
  local due = plan.due or begin_plan(plan)
  due[#due + 1] = key
  for n = 1, #moves do
    local move = moves[n]
    local counters, more = move.counters, move.units
    counters.available, counters.held = counters.available - more, counters.held + more
  end
  buyers[buyer] = plan.units
  buyer_writes[buyer_words + 1] = buyer
  buyer_writes[buyer_words + 2] = plan.units
  buyer_words = buyer_words + 2
  local seq = text(last_seq + 1)
  local record = 'h ' .. seq .. plan.words .. buyer .. ' ' .. lines .. '   '
  orders[key] = record
  order_writes[order_words + 1] = key
  order_writes[order_words + 2] = record
  order_words = order_words + 2
  emit('held', key .. ' - c ' .. ARGV[at] .. '    ' .. record)
  return 'held ' .. seq .. ' ' .. plan.expires
end

-- The deciders of the other commands.
local decide = {}
if commands then
  -- Payments and returns that are remembered of one order at most.
  local NOTES_MAX = 64

  -- The text of a number that comes again within a call: times.
  local texts = {}
  local function usual_text(number)
    local known = texts[number]
    if not known then
      known = text(number)
      texts[number] = known
    end
    return known
  end

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
    order.status, order.seq = status, text(last_seq + 1)
    order.record = encode_order(order)
    order_writes[order_words + 1] = order.key
    order_writes[order_words + 2] = order.record
    order_words = order_words + 2
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
    for i = 1, #list do
      local line = list[i]
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
    local units = add_units(buyers[buyer] or '', list, sign)
    buyers[buyer] = units
    if units == '' then
      emptied[#emptied + 1] = buyer
    else
      buyer_writes[buyer_words + 1] = buyer
      buyer_writes[buyer_words + 2] = units
      buyer_words = buyer_words + 2
    end
  end

  -- Has the sweeper look at the order at its deadline.
  local function fall_due(key, expires)
    expires = usual_text(expires)
    local keys = deadlines[expires] or {}
    keys[#keys + 1] = key
    deadlines[expires] = keys
  end

  -- Puts what an order holds back on sale.
  local function release(order, list)
    move_units(list, 'held', 'available')
    count_units(order.buyer, list, -1)
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

  -- Whether the order still has the time that it was promised.
  local function in_time(order)
    return (order.status == 'h' or order.status == 'p') and now < order.expires
  end

  -- An order that was over before it came: whoever places it later is told so.
  local function tombstone(key, buyer)
    local order = {
      key = key, created = now, expires = now, confirmed = '', hold = '', payment = '', reacquired = '',
      buyer = buyer, lines = '', asked = '', returned = '', notes = '', list = {},
    }
    orders[key] = order
    lane.used, changed.lane.used = true, '1'
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
    local longest = math.min(now + tonumber(lane.grace) * 1000, order.created + tonumber(lane.longest) * 1000)
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
    if refused_by_limit(buyers[order.buyer] or '', list) or refused_by_stock(list) then
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
    elseif not order and last_seq >= full_at then
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
    for _, key in ipairs(due_keys or {}) do
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
      soonest = math.min(soonest or math.huge, tonumber(at))
    end
    return expired .. ' 0 ' .. (soonest and text(soonest) or '')
  end

  -- Outcomes: unknown, order RECORD.
  function decide.get(command)
    local order = order_of(command.key)
    return order and ('order ' .. order.record) or 'unknown'
  end
end
