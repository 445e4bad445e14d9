#!lua flags=allow-oom
-- Opens a frozen lane anew, as it is or after writing all of it anew; called by recovery, step by step.
--
-- KEYS  of the lane, as lua/lane/1_read.lua lists them
-- ARGV  1 the step; 2 the epoch that was taken for this in the database; 3 the token that came with
--       it; then what the step needs:
--         claim  "1" where a lane that is open is to be frozen
--         clear  nothing: the lane is emptied
--         write  the number of a key, a command, and the command's arguments after the key
--         open   the seq that the lane must have
-- Reply { outcome, why, epoch, seq }; outcome: "ok", "open" (nobody wants it recovered: nothing was
--       done), "lost" (another recovery has claimed it, or its server began another run since: nothing
--       was done, begin anew). why: the lane is frozen ("missing": it was not there), epoch, seq: as
--       they were before
--
-- Atomic as every script. What follows a claim demands its token and the run of the server on which it
-- was made, so one that was stopped for a while, or whose steps a restart may have forgotten, changes
-- nothing any more. Repeating a step does no harm.

local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
assert(run, 'the server does not say which run it is')
local step, taken, token = ARGV[1], ARGV[2], ARGV[3]
local lane = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'frozen', 'token', 'run', 'claimed')
local epoch, seq, frozen = lane[1] or '0', lane[2] or '0', lane[3] or ''
local function answer(outcome)
  return { outcome, lane[1] and frozen or 'missing', epoch, seq }
end

if step == 'claim' then
  if tonumber(lane[6] or '0') >= tonumber(taken) or tonumber(epoch) >= tonumber(taken) then
    return answer('lost')
  elseif not lane[1] then
    redis.call('HSET', KEYS[1], 'layout', '2', 'epoch', taken, 'seq', '0', 'frozen', 'rebuild')
  elseif frozen == '' then
    if ARGV[4] ~= '1' then
      return answer('open')
    end
    redis.call('HSET', KEYS[1], 'frozen', 'operator')
  end
  redis.call('HSET', KEYS[1], 'token', token, 'run', run, 'claimed', taken)
  return answer('ok')
end

if lane[4] ~= token or lane[5] ~= run or frozen == '' then
  return answer('lost')
end
if step == 'clear' then
  redis.call('UNLINK', unpack(KEYS))
  redis.call('HSET', KEYS[1], 'layout', '2', 'epoch', taken, 'seq', '0', 'frozen', 'rebuild',
    'token', token, 'run', run, 'claimed', taken)
elseif step == 'write' then
  if frozen ~= 'rebuild' then
    return answer('lost')
  end
  redis.call(ARGV[5], KEYS[tonumber(ARGV[4])], unpack(ARGV, 6))
elseif step == 'open' then
  if seq ~= ARGV[4] then
    return answer('lost')
  end
  -- All of it is recorded: an epoch begins with an empty outbox, which every entry's id follows.
  redis.call('UNLINK', KEYS[6])
  redis.call('HSET', KEYS[1], 'epoch', taken, 'since', seq, 'logged', seq, 'recorded', seq, 'trimmed', seq)
  redis.call('HDEL', KEYS[1], 'frozen', 'token', 'claimed', 'proven', 'relay', 'leased')
else
  error('no such step: ' .. step)
end
return answer('ok')
