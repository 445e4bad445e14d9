-- For wrk, which presses harder than k6 and checks nothing: every request a new buyer's order of
-- one unit. `./dev env` names the addresses and keys; SALE is a sale with an SKU "sku".
--   SALE=mine wrk -t1 -c64 -d8s --latency -s loadtest/orders.lua "$HOLDFAST_URL"
-- RATE      requests a second, evenly spaced over all connections of a thread; else as fast as
--           they are answered. wrk corrects its latencies for those that were sent too late.
-- REPLAYS   N: a tenth of the requests places again one of the orders of buyers replay-1 to
--           replay-N, whose key is the buyer's name.
-- LEVEL     replicated, logged or recorded: how far an order must have got before it is answered.
local headers = {
  ['Authorization'] = 'Bearer ' .. os.getenv('HOLDFAST_ORDERS_KEY'),
  ['Content-Type'] = 'application/json',
}
local level = os.getenv('LEVEL') or 'memory'
if level ~= 'memory' then headers['Prefer'] = 'durability=' .. level end
local before = '{"sale_id":"' .. os.getenv('SALE') .. '","buyer_id":"'
local after = '","lines":[{"sku":"sku","quantity":1}]}'
local rate = tonumber(os.getenv('RATE') or '')
local replays = tonumber(os.getenv('REPLAYS') or '') or 0
local run, orders = tostring(os.time()), 0

local threads = 0
function setup(thread)
  threads = threads + 1
  thread:set('thread', threads)
end

local function buyer()
  orders = orders + 1
  if replays > 0 and orders % 10 == 0 then
    return 'replay-' .. (orders / 10) % replays + 1
  end
  return run .. '-' .. thread .. '-' .. orders
end

function request()
  local name = buyer()
  headers['Idempotency-Key'] = name
  return wrk.format('POST', '/v1/orders', headers, before .. name .. after)
end

if rate then
  local ffi = require('ffi')
  ffi.cdef('typedef struct { long seconds, nanos; } moment; int clock_gettime(int clock, moment *at);')
  local moment, next_at = ffi.new('moment'), nil

  -- Milliseconds that this connection waits for the next slot of its thread.
  function delay()
    ffi.C.clock_gettime(1, moment) -- CLOCK_MONOTONIC
    local now = tonumber(moment.seconds) + tonumber(moment.nanos) / 1e9
    next_at = (next_at or now) + 1 / rate
    return math.max(0, (next_at - now) * 1000)
  end
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    'summary {"seconds": %f, "answered": %d, "refused": %d, "broken": %d, "p50": %f, "p99": %f}',
    summary.duration / 1e6, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6
  ))
end
