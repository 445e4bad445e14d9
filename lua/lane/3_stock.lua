
-- Stock and the sale: stock, preview, adjust, undo, define, phase, archive, marks.

local TOTAL_MAX = 1000000000

local function flag(value)
  return value and '1' or '0'
end

local function optional(number)
  return number and text(number) or ''
end

-- Outcome: stock VERSION OPENS CLOSES PAUSED CLOSED ARCHIVED SKU=AVAILABLE=HELD=SOLD=VERSION=LIMIT,…
function decide.stock()
  local list = {}
  for sku, counters in pairs(stock) do
    list[#list + 1] = table.concat({
      sku, text(counters.available), text(counters.held), text(counters.sold), text(counters.version),
      optional(counters.limit),
    }, '=')
  end
  return table.concat({
    'stock', text(lane.version), optional(lane.opens), optional(lane.closes), flag(lane.paused),
    flag(lane.closed), flag(lane.archived), table.concat(list, ','),
  }, ' ')
end

local function counters_of(counters)
  return table.concat({
    text(counters.available), text(counters.held), text(counters.sold), text(counters.version),
  }, ' ')
end

local function adjustment_record(a)
  return table.concat({
    a.seq, a.at, a.sku, a.delta, a.total, a.before, a.undoes, a.undone_by, a.actor, a.reason,
    a.reference, a.note,
  }, ' ')
end

-- The units that a change would add; or nil, and why it cannot be.
local function delta_of(command)
  if lane.archived then
    return nil, 'archived'
  end
  local counters = stock[command.sku]
  if not counters then
    return nil, 'unknown-sku'
  elseif command.if_version == '' then
    if command.total ~= '' then
      return nil, 'precondition-required'
    end
  elseif command.if_version ~= '*'
    and not string.find(command.if_version, ',' .. text(counters.version) .. ',', 1, true) then
    return nil, 'precondition-failed ' .. counters_of(counters)
  end
  local total = counters.available + counters.held + counters.sold
  local delta = tonumber(command.delta) or tonumber(command.total) - total
  if total + delta < 0 or total + delta > TOTAL_MAX then
    return nil, 'out-of-range ' .. counters_of(counters)
  elseif counters.available + delta < 0 then
    return nil, 'stock-in-use ' .. counters_of(counters)
  end
  return delta
end

-- Moves the units, as one event; `adjustment` has all but what is known only now.
local function apply_adjustment(command, delta, adjustment)
  local counters = stock[adjustment.sku]
  adjustment.key, adjustment.actor = command.key, command.actor
  adjustment.seq, adjustment.at = text(lane.seq + 1), text(now)
  adjustment.delta, adjustment.before, adjustment.undone_by = text(delta), counters_of(counters), ''
  counters.available = counters.available + delta
  counters.version = counters.version + 1
  changed.stock[adjustment.sku] = counters
  changed.lane.used = '1'
  lane.used = true
  adjustments[command.key], changed.adjustments[command.key] = adjustment, adjustment
  emit('adjusted', table.concat({ command.key, command.trace, adjustment_record(adjustment) }, ' '))
  return adjustment_record(adjustment)
end

-- Outcomes: possible DELTA and the counters, or why an adjustment would be refused.
function decide.preview(command)
  local delta, refusal = delta_of(command)
  return refusal or ('possible ' .. text(delta) .. ' ' .. counters_of(stock[command.sku]))
end

-- Whether a known adjustment was asked for in the same words. Its delta, where a total was asked
-- for, is what came of it.
local function same_adjustment(known, command)
  local same_change = known.total == command.total and (known.total ~= '' or known.delta == command.delta)
  return same_change and known.undoes == '' and known.sku == command.sku and known.reason == command.reason
    and known.reference == command.reference and known.note == command.note
end

-- Outcomes: archived, unknown-sku, reused, precondition-required; with the counters:
-- precondition-failed, out-of-range, stock-in-use; with the adjustment's record: adjusted, replayed.
function decide.adjust(command)
  local known = adjustments[command.key]
  if known then
    return same_adjustment(known, command) and ('replayed ' .. adjustment_record(known)) or 'reused'
  end
  local delta, refusal = delta_of(command)
  return refusal or ('adjusted ' .. apply_adjustment(command, delta, {
    sku = command.sku, total = command.total, undoes = '', reason = command.reason,
    reference = command.reference, note = command.note,
  }))
end

-- Outcomes: unknown, archived, reused, already-undone ID; with the SKU and its counters:
-- out-of-range, stock-in-use; with the new adjustment's record: adjusted, replayed.
function decide.undo(command)
  local known = adjustments[command.key]
  if known then
    local same = known.undoes == command.undoes and known.note == command.note
    return same and ('replayed ' .. adjustment_record(known)) or 'reused'
  end
  local original = adjustments[command.undoes_key]
  if not original then
    return 'unknown'
  elseif lane.archived then
    return 'archived'
  elseif original.undone_by ~= '' then
    return 'already-undone ' .. original.undone_by
  end
  local counters = stock[original.sku]
  assert(counters, 'an adjustment names an SKU that the lane does not have')
  local delta = 0 - tonumber(original.delta) -- a bare minus would make -0 of 0
  if counters.available + delta < 0 then
    return 'stock-in-use ' .. original.sku .. ' ' .. counters_of(counters)
  elseif counters.available + counters.held + counters.sold + delta > TOTAL_MAX then
    return 'out-of-range ' .. original.sku .. ' ' .. counters_of(counters)
  end
  original.undone_by = command.id
  changed.adjustments[original.key] = original
  return 'adjusted ' .. apply_adjustment(command, delta, {
    sku = original.sku, total = '', undoes = command.undoes, reason = 'correction',
    reference = original.reference, note = command.note,
  })
end

-- Why a definition cannot replace the present one once there are orders or adjustments.
local function fixed(named)
  for sku, counters in pairs(stock) do
    if not named[sku] then
      return 'removes SKU ' .. sku
    elseif named[sku].stock ~= counters.initial then
      return 'changes the stock of SKU ' .. sku
    end
  end
end

-- Makes the counters those of the definition; returns "sku=delta,…" of what that moved.
local function apply_stock(command, named)
  local moved = {}
  local function move(sku, delta)
    if delta ~= 0 then
      moved[#moved + 1] = sku .. '=' .. text(delta)
    end
  end
  for sku, counters in pairs(stock) do
    if not named[sku] then
      move(sku, -counters.available)
      changed.gone[sku] = true
    end
  end
  for sku in pairs(changed.gone) do
    stock[sku], changed.stock[sku] = nil, nil
  end
  for _, entry in ipairs(command.skus) do
    local counters = stock[entry.sku]
    if not counters then
      counters = { available = 0, held = 0, sold = 0, version = 0, initial = 0 }
      stock[entry.sku] = counters
      changed.gone[entry.sku] = nil
    end
    move(entry.sku, entry.stock - counters.initial)
    counters.available = counters.available + entry.stock - counters.initial
    counters.initial = entry.stock
    counters.limit = number_or_nil(entry.limit)
    changed.stock[entry.sku] = counters
  end
  return table.concat(moved, ',')
end

-- Outcomes: missing (and not to be created), archived, stale VERSION, same, in-use WHY, defined.
function decide.define(command)
  if not lane.exists then
    -- Remains of a lane without the lane itself are no empty lane: the reconciler must look.
    if command.epoch == '' or redis.call('EXISTS', unpack(KEYS, 2)) > 0 then
      return 'missing'
    end
    lane.exists = true
    lane.epoch = tonumber(command.epoch)
    changed.lane.layout, changed.lane.epoch, changed.lane.since = '2', command.epoch, '0'
    changed.lane.logged, changed.lane.recorded, changed.lane.trimmed = '0', '0', '0'
  elseif lane.archived then
    return 'archived'
  elseif command.version < lane.version or (command.version == lane.version and command.digest ~= lane.digest) then
    return 'stale ' .. text(lane.version)
  elseif command.version == lane.version then
    return 'same'
  end
  local named = {}
  for _, entry in ipairs(command.skus) do
    named[entry.sku] = entry
  end
  local why = lane.used and fixed(named)
  if why then
    return 'in-use ' .. why
  end
  local moved = apply_stock(command, named)
  for _, field in ipairs({ 'digest', 'opens', 'closes', 'hold', 'grace', 'longest', 'limit' }) do
    changed.lane[field] = command[field]
  end
  changed.lane.version = text(command.version)
  lane.version, lane.digest = command.version, command.digest
  lane.opens, lane.closes = number_or_nil(command.opens), number_or_nil(command.closes)
  lane.hold, lane.grace, lane.longest = tonumber(command.hold), tonumber(command.grace), tonumber(command.longest)
  lane.limit = number_or_nil(command.limit)
  emit('defined', table.concat({ command.trace, command.actor, text(command.version), moved, command.definition }, ' '))
  return 'defined'
end

local function pause_or_resume(command, paused)
  if lane.paused ~= paused then
    lane.paused, changed.lane.paused = paused, flag(paused)
    emit(paused and 'paused' or 'resumed', command.trace .. ' ' .. command.actor)
  end
end

-- Outcomes: archived, closed (final: neither pause nor resume undoes it), done.
function decide.phase(command)
  if lane.archived then
    return 'archived'
  elseif command.change == 'close' then
    if not lane.closed then
      lane.closed, changed.lane.closed = now, text(now)
      emit('closed', command.trace .. ' ' .. command.actor)
    end
  elseif lane.closed then
    return 'closed'
  else
    pause_or_resume(command, command.change == 'pause')
  end
  return 'done'
end

-- Ends a closed sale in which nothing is held or unrecorded and whose retention is over. From then
-- on it changes no more; lua/forget.lua takes it out of Redis once this event too is recorded.
-- Outcomes: archived, not-yet.
function decide.archive(command)
  if lane.archived then
    return 'archived'
  end
  local closed = lane.closed
  if lane.closes and now >= lane.closes then
    closed = math.min(closed or lane.closes, lane.closes)
  end
  if not closed or now < closed + command.retention or lane.recorded < lane.seq then
    return 'not-yet'
  end
  for _, counters in pairs(stock) do
    if counters.held > 0 then
      return 'not-yet'
    end
  end
  lane.archived, changed.lane.archived = true, '1'
  emit('archived', '')
  return 'archived'
end

function decide.marks()
  return 'marks'
end
