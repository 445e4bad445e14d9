// After the rush: the stock is gone, and everybody still asks. A refusal must stay cheap and
// right, and those who have an order must find it again however long the others knock.
import { check, fail } from 'k6';
import exec from 'k6/execution';
import * as api from './lib/api.js';
import { defineSale, setting } from './lib/sale.js';
import { insist, place } from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

const SKUS = ['shoe-41', 'shoe-42'];
const UNITS = setting('STOCK', 100);
const RATE = setting('RATE', 1500);
const SECONDS = setting('SECONDS', 10);
const VUS = setting('VUS', 100);
const SHARE_THAT_REPLAYS = 0.1;

export const options = loadOptions(SKUS, {
  knock: {
    executor: 'constant-arrival-rate',
    exec: 'knock',
    rate: RATE,
    duration: `${SECONDS}s`,
    preAllocatedVUs: VUS,
    maxVUs: 5 * VUS,
    gracefulStop: '60s',
  },
});

const orderOf = (holder) => ({
  buyer: `holder-${holder}`,
  key: `order-${holder}`,
  lines: SKUS.map((sku) => ({ sku, quantity: 1 })),
});

/** Sells it out before the run: each holder takes one of each SKU. */
export function setup() {
  const sale = defineSale('soldout', {
    hold_seconds: 900,
    skus: SKUS.map((sku) => ({ sku, stock: UNITS })),
  });
  const ids = [];
  for (let holder = 0; holder < UNITS; holder += 1) {
    const order = place(sale, orderOf(holder));
    if (order === null) fail('the sale could not be sold out');
    ids.push(order.id);
  }
  return { sale, ids };
}

export function knock({ sale, ids }) {
  if (Math.random() < SHARE_THAT_REPLAYS) {
    replay(sale, ids);
  } else {
    comeTooLate(sale);
  }
}

function replay(sale, ids) {
  const holder = Math.floor(Math.random() * ids.length);
  const answer = insist(api.placeOrder(sale, orderOf(holder)));
  check(answer, {
    'a replay finds its own order, also when all is sold': ({ res, replayed, body }) =>
      res.status === 201 && replayed && body.id === ids[holder] && body.status === 'held',
  });
}

function comeTooLate(sale) {
  const n = exec.scenario.iterationInTest;
  const order = { buyer: `late-${n}`, key: `order-${n}`, lines: [{ sku: SKUS[n % SKUS.length], quantity: 1 }] };
  let refusal = null;
  const bought = place(sale, order, { told: (answer) => { refusal = answer; } });
  check(bought, { 'nobody buys what is not there': (none) => none === null });
  if (refusal.code !== 'sold-out') return;
  check(refusal.body, {
    'sold out says which line is short': ({ lines }) =>
      lines.length === 1 && lines[0].sku === order.lines[0].sku && lines[0].available === 0,
  });
}
