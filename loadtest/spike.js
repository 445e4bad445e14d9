// The doors open: from nobody to everybody within a second, on one SKU, many more buyers than
// units, every buyer once. Sells every unit exactly once; the others learn that it is sold out.
import { check } from 'k6';
import exec from 'k6/execution';
import { defineSale, setting, stock, watchStock } from './lib/sale.js';
import { place } from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

const SKU = 'console';
const UNITS = setting('STOCK', 2000);
const RATE = setting('RATE', 1500);
const SECONDS = setting('SECONDS', 15);
const VUS = setting('VUS', 200);

export const options = loadOptions([SKU], {
  // Buyers come whether or not those before them have been served.
  buyers: {
    executor: 'ramping-arrival-rate',
    exec: 'buy',
    startRate: 0,
    timeUnit: '1s',
    stages: [
      { duration: '1s', target: RATE },
      { duration: `${SECONDS}s`, target: RATE },
    ],
    preAllocatedVUs: VUS,
    maxVUs: 5 * VUS,
    gracefulStop: '60s',
  },
  watch: {
    executor: 'constant-arrival-rate',
    exec: 'watch',
    rate: 5,
    duration: `${SECONDS}s`,
    preAllocatedVUs: 2,
    maxVUs: 10,
    gracefulStop: '60s',
  },
});

export function setup() {
  const sale = defineSale('spike', {
    per_buyer_limit: 1,
    // Longer than the run and its books: what is held stays so while it is compared.
    hold_seconds: 900,
    skus: [{ sku: SKU, stock: UNITS }],
  });
  return { sale };
}

export function buy({ sale }) {
  const n = exec.scenario.iterationInTest;
  const order = { buyer: `buyer-${n}`, key: `order-${n}`, lines: [{ sku: SKU, quantity: 1 }] };
  place(sale, order, { told: sayWhatIsShort });
}

function sayWhatIsShort(answer) {
  if (answer.code !== 'sold-out') return;
  check(answer.body, {
    'sold out only where nothing is left': ({ lines }) =>
      lines.length === 1 && lines[0].sku === SKU && lines[0].requested === 1 && lines[0].available === 0,
  });
}

export function watch({ sale }) {
  watchStock(sale);
}

export function teardown({ sale }) {
  // With fewer buyers than this it would prove nothing, so a person who asks for it may have it.
  if (RATE * SECONDS < 2 * UNITS) return;
  const counters = stock(sale);
  check(counters, {
    'every unit found a buyer': (left) => left !== null && left[SKU].available === 0 && left[SKU].held === UNITS,
  });
}
