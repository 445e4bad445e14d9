#!lua flags=no-writes
-- Shows a page of one of a lane's hashes, and where the lane stands at that very moment; called by
-- whoever reconciles.
--
-- KEYS  1 lane (hash), 2 a hash of the same lane
-- ARGV  1 the cursor of HSCAN, "0" to begin, or "all" for the whole hash; 2 its COUNT
-- Reply { epoch, seq, recorded, cursor, { field, value, … } }; epoch 0: no such lane. The cursor is "0"
--       where there is no more.
--
-- Atomic as every script, so what is shown is as the event `seq` left it; it changes nothing.

local lane = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'recorded')
if not lane[1] then
  return { '0', '0', '0', '0', {} }
end
local cursor, pairs = '0', nil
if ARGV[1] == 'all' then
  pairs = redis.call('HGETALL', KEYS[2])
else
  local page = redis.call('HSCAN', KEYS[2], ARGV[1], 'COUNT', ARGV[2])
  cursor, pairs = page[1], page[2]
end
return { lane[1], lane[2] or '0', lane[3] or '0', cursor, pairs }
