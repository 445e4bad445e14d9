#!lua flags=allow-oom
-- Moves a lane's marks forward and trims its outbox; called by the relay that has the lane's lease.
--
-- KEYS  1 lane (hash), 2 outbox (stream)
-- ARGV  1 epoch the relay works under; 2 logged, 3 recorded: the highest seq that Kafka, the
--       database has; 4 events beyond which the outbox is trimmed up to what this relay has seen Kafka
--       take and not only up to `recorded`; 5 the relay's name; 6 for how long it wants the lane (ms);
--       7 the highest seq that it has seen Kafka take, beginning at `recorded`: below `logged` while
--       what Kafka has lost is sent again, which must not be trimmed meanwhile
-- Reply { outcome, epoch, seq, logged, recorded, trimmed }; outcome: "missing" (or there is
--       nothing but recovery's claim), "epoch" (the lane has another one: nothing was done), "leased" (another relay has it: nothing was done),
--       "behind" (Kafka or the database has more than the lane: Redis lost what it had answered; the
--       lane is frozen, and above all nothing trimmed, for what it holds under those seqs is
--       something else), "ok". A frozen lane's marks go on like any other's: its outbox is drained.
--
-- Atomic as every script; idempotent, since marks only rise. Both keys are read before the first
-- write. Trimming is by seq, never by length, and never beyond what somebody else has: an entry's
-- id is "epoch-lastseq", so MINID keeps whatever has an event above the bound. The lease only saves
-- double work: a second relay would send the same events again, which the writer drops.

local LEASE_MAX = 60000 -- ms; the highest that relay.lease_ms can be

local function text(number)
  return string.format('%.0f', number)
end

local lane = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'logged', 'recorded', 'trimmed', 'relay', 'leased', 'frozen')
if not lane[1] or not lane[3] then
  return { 'missing', '0', '0', '0', '0', '0' }
end
local function answer(outcome, logged, recorded, trimmed)
  return { outcome, lane[1], lane[2], text(logged), text(recorded), text(trimmed) }
end
local seq, logged, recorded, trimmed = tonumber(lane[2]), tonumber(lane[3]), tonumber(lane[4]), tonumber(lane[5])
if lane[1] ~= ARGV[1] then
  return answer('epoch', logged, recorded, trimmed)
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- A lease beyond the longest there is was made before the clock stepped back: it binds nobody.
local left = tonumber(lane[7] or '0') - now
if lane[6] and lane[6] ~= ARGV[5] and left > 0 and left <= LEASE_MAX then
  return answer('leased', logged, recorded, trimmed)
end
if tonumber(ARGV[2]) > seq or tonumber(ARGV[3]) > seq then
  if not lane[8] or lane[8] == '' then
    redis.call('HSET', KEYS[1], 'frozen', 'behind')
  end
  return answer('behind', logged, recorded, trimmed)
end
redis.call('XLEN', KEYS[2])

-- What the database has was in Kafka, whoever brought it there.
recorded = math.max(recorded, tonumber(ARGV[3]))
logged = math.max(logged, recorded, tonumber(ARGV[2]))
local bound = recorded
if seq - recorded > tonumber(ARGV[4]) then
  bound = math.max(recorded, math.min(logged, tonumber(ARGV[7])))
end
if bound > trimmed then
  redis.call('XTRIM', KEYS[2], 'MINID', ARGV[1] .. '-' .. text(bound + 1))
  trimmed = bound
end
redis.call('HSET', KEYS[1], 'logged', text(logged), 'recorded', text(recorded), 'trimmed', text(trimmed),
  'relay', ARGV[5], 'leased', text(now + tonumber(ARGV[6])))
return answer('ok', logged, recorded, trimmed)
