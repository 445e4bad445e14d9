
-- Decide the commands in order, then write, the outbox first.

local replies = {}
for n, command in ipairs(commands) do
  if lane.exists or command.kind == 'define' then
    replies[n] = decide[command.kind](command)
  else
    replies[n] = 'missing'
  end
end

-- Field and value pairs of a table, for one HSET.
local function pairs_of(fields, encode)
  local list, words = {}, 0
  for field, value in pairs(fields) do
    list[words + 1] = field
    list[words + 2] = encode(value)
    words = words + 2
  end
  return list
end

local function as_is(value)
  return value
end

local function encode_counters(c)
  return table.concat({
    text(c.available), text(c.held), text(c.sold), text(c.version), c.limit and text(c.limit) or '',
    text(c.initial),
  }, ' ')
end

local function hset(key, list)
  if #list > 0 then
    redis.call('HSET', key, unpack(list))
  end
end

local function hdel(key, list)
  if #list > 0 then
    redis.call('HDEL', key, unpack(list))
  end
end

local function write_buyers()
  local kept, words, gone = {}, 0, {}
  for buyer, count in pairs(changed.buyers) do
    local units
    for sku, number in pairs(count) do
      if sku ~= 1 and number > 0 then
        units = (units and units .. ',' or '') .. sku .. '=' .. usual_text(number)
      end
    end
    if units then
      kept[words + 1] = buyer
      kept[words + 2] = units
      words = words + 2
    else
      gone[#gone + 1] = buyer
    end
  end
  hset(KEYS[3], kept)
  hdel(KEYS[3], gone)
end

-- WAIT proves what its connection has written before it, and nothing else. So a call that is to be
-- proven writes: its events, or where it has none and the lane stands above what is proven, the mark.
if proves then
  changed.lane.proven = text(lane.epoch) .. '-' .. text(lane.proven)
end

if event_words > 0 then
  local due = {}
  for at, keys in pairs(deadlines) do
    due[#due + 1] = text(at)
    due[#due + 1] = table.concat(keys)
  end
  if #due > 0 then
    redis.call('ZCARD', KEYS[5]) -- raises on a wrong type, while nothing is written
  end
  redis.call('XADD', KEYS[6], text(lane.epoch) .. '-' .. text(lane.seq), 'at', text(now), unpack(events))

  changed.lane.seq, changed.lane.now = text(lane.seq), text(now)
  if not lane.run then
    changed.lane.run = run
  end
  hset(KEYS[1], pairs_of(changed.lane, as_is))
  hset(KEYS[2], pairs_of(changed.stock, encode_counters))
  local removed = {}
  for sku in pairs(changed.gone) do
    removed[#removed + 1] = sku
  end
  hdel(KEYS[2], removed)
  write_buyers()
  hset(KEYS[4], pairs_of(changed.orders, as_is))
  hset(KEYS[7], pairs_of(changed.adjustments, adjustment_record))
  if #due > 0 then
    redis.call('ZADD', KEYS[5], unpack(due))
  end
elseif proves and lane.exists and lane.seq > lane.proven then
  redis.call('HSET', KEYS[1], 'proven', changed.lane.proven)
end
if #due_members > 0 then
  redis.call('ZREM', KEYS[5], unpack(due_members))
end

return { stands(), table.concat(replies, '\n') }
