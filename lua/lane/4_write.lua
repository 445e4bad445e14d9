
-- Decide the commands in order, then write, the outbox first.

local replies = {}
for n = 1, command_count do
  local command = commands and commands[n]
  local kind = command and ARGV[places[n]]
  if not lane.exists and kind ~= 'define' then
    replies[n] = 'missing'
  elseif kind then
    plans = {}
    replies[n] = decide[kind](command)
  else
    replies[n] = reserve(places[n], shared[n])
  end
end

-- Field and value pairs of a table, for one HSET.
local function hset(key, values)
  local list, words = {}, 0
  for field, value in pairs(values) do
    list[words + 1] = field
    list[words + 2] = value
    words = words + 2
  end
  if words > 0 then
    redis.call('HSET', key, unpack(list))
  end
end

-- WAIT proves what its connection has written before it, and nothing else. So a call that is to be
-- proven writes: its events, or where it has none and the lane stands above what is proven, the mark.
if proves then
  changed.lane.proven = lane.epoch .. '-' .. text(lane.proven)
end

if event_words > 0 then
  local due, due_words = {}, 0
  for at, keys in pairs(deadlines) do
    due[due_words + 1] = at
    due[due_words + 2] = table.concat(keys)
    due_words = due_words + 2
  end
  if due_words > 0 then
    redis.call('ZCARD', KEYS[5]) -- raises on a wrong type, while nothing is written
  end
  changed.lane.seq, changed.lane.now = text(last_seq), now_text
  redis.call('XADD', KEYS[6], lane.epoch .. '-' .. changed.lane.seq, 'at', changed.lane.now, unpack(events))

  if not lane.run then
    changed.lane.run = run
  end
  hset(KEYS[1], changed.lane)
  for sku, counters in pairs(changed.stock) do
    changed.stock[sku] =
      text(counters.available) .. ' ' .. text(counters.held) .. ' ' .. text(counters.sold) .. ' ' .. counters.rest
  end
  hset(KEYS[2], changed.stock)
  if buyer_words > 0 then
    redis.call('HSET', KEYS[3], unpack(buyer_writes))
  end
  if order_words > 0 then
    redis.call('HSET', KEYS[4], unpack(order_writes))
  end
  if commands then
    local function hdel(key, list)
      if #list > 0 then
        redis.call('HDEL', key, unpack(list))
      end
    end
    local removed, have_nothing = {}, {}
    for sku in pairs(changed.gone) do
      removed[#removed + 1] = sku
    end
    for _, buyer in ipairs(emptied) do
      if buyers[buyer] == '' then
        have_nothing[#have_nothing + 1] = buyer
      end
    end
    hdel(KEYS[2], removed)
    hdel(KEYS[3], have_nothing)
    hset(KEYS[7], changed.adjustments)
  end
  if due_words > 0 then
    redis.call('ZADD', KEYS[5], unpack(due))
  end
elseif proves and lane.exists and last_seq > lane.proven then
  redis.call('HSET', KEYS[1], 'proven', changed.lane.proven)
end
if due_members and #due_members > 0 then
  redis.call('ZREM', KEYS[5], unpack(due_members))
end

return { stands(changed.lane.seq or text(last_seq)), table.concat(replies, '\n') }
