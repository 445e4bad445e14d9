-- For wrk, which presses harder than k6 and checks nothing: every request a new buyer's order of
-- one unit. `./dev env` names the addresses and keys; SALE is a sale with an SKU "sku".
--   SALE=mine wrk -t1 -c64 -d8s --latency -s loadtest/orders.lua "$HOLDFAST_URL"
local headers = {
  ['Authorization'] = 'Bearer ' .. os.getenv('HOLDFAST_ORDERS_KEY'),
  ['Content-Type'] = 'application/json',
}
local before = '{"sale_id":"' .. os.getenv('SALE') .. '","buyer_id":"'
local after = '","lines":[{"sku":"sku","quantity":1}]}'
local run, orders = tostring(os.time()), 0

local threads = 0
function setup(thread)
  threads = threads + 1
  thread:set('thread', threads)
end

function request()
  orders = orders + 1
  local buyer = run .. '-' .. thread .. '-' .. orders
  headers['Idempotency-Key'] = buyer
  return wrk.format('POST', '/v1/orders', headers, before .. buyer .. after)
end
