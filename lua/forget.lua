#!lua flags=allow-oom
-- Takes an archived lane out of Redis; called by the sweeper.
--
-- KEYS  1 lane (hash), then every other key of the lane
-- ARGV  none
-- Reply "forgotten", "missing" (it is gone already), or "not-yet": it is not archived, or not all
--       of it is recorded
--
-- Atomic as every script, and idempotent: a lane that is gone stays gone. The database has all of
-- it, since `recorded` has reached the archived event, the lane's last.

local lane = redis.call('HMGET', KEYS[1], 'archived', 'seq', 'recorded')
if not lane[2] then
  return 'missing'
end
if lane[1] ~= '1' or tonumber(lane[3]) < tonumber(lane[2]) then
  return 'not-yet'
end
redis.call('UNLINK', unpack(KEYS))
return 'forgotten'
