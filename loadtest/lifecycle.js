// What a sale is made of: baskets of several SKUs that are paid, given back, cancelled by a caller
// who never got its answer, or left to run out, while an operator corrects the stock. In the end
// nothing is held.
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import * as api from './lib/api.js';
import { defineSale, setting, waitFor, waitUntilNothingIsHeld, watchStock } from './lib/sale.js';
import { adjust, cancel, cancelWithKey, confirm, insist, layTombstone, place } from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

const UNITS = setting('STOCK', 1000);
const RATE = setting('RATE', 150);
const SECONDS = setting('SECONDS', 20);
const VUS = setting('VUS', 200);
const HOLD_SECONDS = setting('HOLD_SECONDS', 3);
// The contract gives expired stock a second to be back; a loaded machine gets more to prove it.
const LATE_SECONDS = 30;

// One that runs short, so that there are refusals, and one with a limit of its own.
const STOCK = [
  { sku: 'hoodie', stock: 2 * UNITS },
  { sku: 'cap', stock: 2 * UNITS },
  { sku: 'poster', stock: 2 * UNITS, per_buyer_limit: 2 },
  { sku: 'pin', stock: 4 * UNITS },
  { sku: 'vinyl', stock: Math.ceil(UNITS / 5) },
];
const SKUS = STOCK.map(({ sku }) => sku);
// So few that some come back until their limit stops them.
const BUYERS = Math.ceil((RATE * SECONDS) / 2);

export const options = loadOptions(SKUS, {
  buyers: {
    executor: 'constant-arrival-rate',
    exec: 'buy',
    rate: RATE,
    duration: `${SECONDS}s`,
    preAllocatedVUs: VUS,
    maxVUs: 5 * VUS,
    gracefulStop: '60s',
  },
  operator: {
    executor: 'constant-arrival-rate',
    exec: 'correct',
    rate: 2,
    duration: `${SECONDS}s`,
    preAllocatedVUs: 5,
    maxVUs: 20,
    gracefulStop: '60s',
  },
  watch: {
    executor: 'constant-arrival-rate',
    exec: 'watch',
    rate: 5,
    duration: `${SECONDS + HOLD_SECONDS}s`,
    preAllocatedVUs: 2,
    maxVUs: 10,
    gracefulStop: '60s',
  },
});

export function setup() {
  return { sale: defineSale('lifecycle', { hold_seconds: HOLD_SECONDS, per_buyer_limit: 6, skus: STOCK }) };
}

export function watch({ sale }) {
  watchStock(sale);
}

export function teardown({ sale }) {
  waitUntilNothingIsHeld(sale, HOLD_SECONDS + LATE_SECONDS);
}

// ---- buyers

// Of a hundred buyers so many do this with what they hold.
const FATES = [
  [40, pay],
  [5, payAtTheLastMoment],
  [15, giveBack],
  [8, giveBackByKey],
  [5, changeMindBefore],
  [7, payAndGiveBackAtOnce],
  [15, walkAway],
  [5, comeBackTooLate],
];

export function buy({ sale }) {
  const n = exec.scenario.iterationInTest;
  const asked = { buyer: `buyer-${Math.floor(Math.random() * BUYERS)}`, key: `order-${n}`, lines: basket() };
  let dice = Math.random() * 100;
  const [, fate] = FATES.find(([share]) => (dice -= share) < 0);
  fate(sale, asked, n);
}

function basket() {
  const size = [1, 1, 1, 2, 2, 3][Math.floor(Math.random() * 6)];
  const skus = [...SKUS].sort(() => Math.random() - 0.5).slice(0, size);
  return skus.map((sku) => ({ sku, quantity: Math.random() < 0.8 ? 1 : 2 }));
}

function pay(sale, asked, n) {
  const order = place(sale, asked);
  if (order === null) return;
  sleep(Math.random());
  if (!confirm(order, `payment-${n}`)) return;
  if (n % 4 === 0) staysPaid(sale, asked, order, n);
}

function staysPaid(sale, asked, order, n) {
  check(insist(api.confirmOrder(order.id, `payment-${n}`)), {
    'the same payment again changes nothing': ({ res, body }) => res.status === 200 && body.status === 'confirmed',
  });
  check(insist(api.confirmOrder(order.id, `other-${n}`)), {
    'another payment is refused': ({ res, code }) => res.status === 409 && code === 'already-paid',
  });
  check(insist(api.cancelOrder(order.id)), {
    'what is paid is not cancelled': ({ res, code }) => res.status === 409 && code === 'order-confirmed',
  });
  check(insist(api.placeOrder(sale, asked)), {
    'its key finds a paid order with 200': ({ res, body, replayed }) =>
      res.status === 200 && replayed && body.id === order.id && body.status === 'confirmed',
  });
}

/** On the very deadline either is right, and only one. */
function payAtTheLastMoment(sale, asked, n) {
  const order = place(sale, asked);
  if (order === null) return;
  const left_ms = Date.parse(order.expires_at) - Date.now();
  sleep(Math.max(0, left_ms + 200 * (Math.random() - 0.5)) / 1000);
  const sold = confirm(order, `payment-${n}`);
  check(insist(api.getOrder(order.id)), {
    'a race of payment and deadline has one end': ({ body }) => body.status === (sold ? 'confirmed' : 'expired'),
  });
}

function giveBack(sale, asked) {
  const order = place(sale, asked);
  if (order === null) return;
  sleep(Math.random() / 2);
  if (!cancel(order)) return;
  staysCancelled(sale, asked, order);
}

function giveBackByKey(sale, asked) {
  const order = place(sale, asked);
  if (order === null) return;
  if (!cancelWithKey(sale, asked, order)) return;
  staysCancelled(sale, asked, order);
}

function staysCancelled(sale, asked, order) {
  check(insist(api.cancelOrder(order.id)), {
    'cancelling again changes nothing': ({ res, body }) => res.status === 200 && body.status === 'cancelled',
  });
  check(insist(api.placeOrder(sale, asked)), {
    'a cancelled order is not sold to its key': ({ res, code, body }) =>
      res.status === 409 && code === 'order-cancelled' && body.order.id === order.id,
  });
}

/** The cancel overtakes its order: what comes later with this key must not hold stock. */
function changeMindBefore(sale, asked) {
  if (!layTombstone(sale, asked)) return;
  const order = place(sale, asked);
  check(order, { 'an order cancelled before it came is not held': (none) => none === null });
}

function payAndGiveBackAtOnce(sale, asked, n) {
  const order = place(sale, asked);
  if (order === null) return;
  const payment = `payment-${n}`;
  const [paid, given] = api.sendTogether([api.confirmOrder(order.id, payment), api.cancelOrder(order.id)]);
  const sold = confirm(order, payment, { early: [paid] });
  const cancelled = cancel(order, { early: [given] });
  check(null, { 'a race of payment and cancel has one end': () => sold !== cancelled });
}

function walkAway(sale, asked) {
  place(sale, asked);
}

function comeBackTooLate(sale, asked, n) {
  const order = place(sale, asked);
  if (order === null) return;
  const left_ms = Date.parse(order.expires_at) - Date.now();
  sleep(left_ms / 1000);
  let seen = null;
  const expired = waitFor(LATE_SECONDS, () => {
    seen = insist(api.getOrder(order.id));
    return seen.kind === 'done' && seen.body.status === 'expired';
  });
  check(expired, { 'a hold that is not paid runs out': (came) => came });
  check(insist(api.placeOrder(sale, asked)), {
    'an expired order is not sold to its key': ({ res, code }) => res.status === 409 && code === 'order-expired',
  });
  if (n % 2 === 0) cancel(order);
}

// ---- the operator

const REASONS = ['restock', 'damaged', 'lost', 'recount', 'correction'];

export function correct({ sale }) {
  const n = exec.scenario.iterationInTest;
  const change = {
    sku: SKUS[n % SKUS.length],
    key: `adjustment-${n}`,
    delta: n % 3 === 0 ? -(1 + (n % 4)) : 1 + (n % 7),
    reason: REASONS[n % REASONS.length],
  };
  const adjustment = adjust(sale, change);
  if (adjustment === null || n % 2 === 0) return;
  check(insist(api.adjustStock(sale, change)), {
    'an adjustment with the same key is the same': ({ res, body, replayed }) =>
      res.status === 200 && replayed && body.id === adjustment.id,
  });
}
