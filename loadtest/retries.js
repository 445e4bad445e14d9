// Everybody presses the button again: each request up to three times with the same key, one after
// another, at once, and by callers who leave before they are answered. One key is one order.
import { check } from 'k6';
import exec from 'k6/execution';
import * as api from './lib/api.js';
import { defineSale, setting } from './lib/sale.js';
import { cancel, confirm, insist, place } from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

const SKUS = ['ticket-a', 'ticket-b'];
const UNITS = setting('STOCK', 50000);
const RATE = setting('RATE', 120);
const SECONDS = setting('SECONDS', 15);
const VUS = setting('VUS', 50);
// Less than many answers take, and enough for most requests to be on their way.
const LEAVES_AFTER_MS = 1;
// Few leave without waiting, for each of them is a line of warning from k6.
const WAYS = [atOnce, oneAfterAnother, atOnce, oneAfterAnother, atOnce, oneAfterAnother, atOnce, oneAfterAnother, withoutWaiting];

export const options = loadOptions(SKUS, {
  press: {
    executor: 'constant-arrival-rate',
    exec: 'press',
    rate: RATE,
    duration: `${SECONDS}s`,
    preAllocatedVUs: VUS,
    maxVUs: 5 * VUS,
    gracefulStop: '60s',
  },
});

export function setup() {
  const sale = defineSale('retries', {
    per_buyer_limit: 5,
    hold_seconds: 900,
    // Plenty: where a request was lost, only an order that is found again tells what it did.
    skus: SKUS.map((sku) => ({ sku, stock: UNITS })),
  });
  return { sale };
}

export function press({ sale }) {
  const n = exec.scenario.iterationInTest;
  const asked = {
    buyer: `buyer-${n}`,
    key: `order-${n}`,
    lines: SKUS.slice(0, 1 + (n % SKUS.length)).map((sku) => ({ sku, quantity: 1 + (n % 2) })),
  };
  const order = WAYS[n % WAYS.length](sale, asked);
  if (order === null) return;
  settle(order, n);
  if (n % 5 === 0) useKeyForAnother(sale, asked);
}

function oneAfterAnother(sale, asked) {
  const order = place(sale, asked);
  if (order === null) return null;
  for (let again = 0; again < 2; again += 1) {
    // Members and lines in another order mean the same.
    const same = { ...asked, lines: [...asked.lines].reverse() };
    isThatOrder(order, insist(api.placeOrder(sale, same)));
  }
  return order;
}

function atOnce(sale, asked) {
  const request = api.placeOrder(sale, asked);
  const early = api.sendTogether([request, request, request]);
  const answers = early.map(api.read).filter(({ kind }) => kind === 'done');
  const order = place(sale, asked, { early, resent: true });
  if (order === null) return null;
  for (const answer of answers) check(answer, { 'one key is one order': ({ body }) => body.id === order.id });
  if (answers.length === early.length) {
    check(answers, {
      'of requests at once, one makes the order and the others find it': (all) =>
        all.filter(({ replayed }) => !replayed).length === 1,
    });
  }
  return order;
}

function withoutWaiting(sale, asked) {
  const order = place(sale, asked, { timeout_ms: LEAVES_AFTER_MS });
  if (order === null) return null;
  isThatOrder(order, insist(api.placeOrder(sale, asked)));
  return order;
}

function isThatOrder(order, answer) {
  check(answer, {
    'one key is one order': ({ res, body, replayed }) => res.status === 201 && body.id === order.id && replayed,
  });
}

/** Confirms and cancels are pressed again too; a quarter stays held. */
function settle(order, n) {
  const payment = `payment-${n}`;
  if (n % 4 === 0) {
    const request = api.confirmOrder(order.id, payment);
    confirm(order, payment, { early: api.sendTogether([request, request, request]) });
  } else if (n % 4 === 1) {
    const request = api.cancelOrder(order.id);
    cancel(order, { early: api.sendTogether([request, request, request]) });
  } else if (n % 4 === 2) {
    confirm(order, payment, { timeout_ms: n % WAYS.length === 0 ? LEAVES_AFTER_MS : undefined });
    const again = insist(api.confirmOrder(order.id, payment));
    check(again, {
      'the same payment again changes nothing': ({ res, body }) =>
        res.status === 200 && body.status === 'confirmed' && body.payment_id === payment,
    });
  }
}

function useKeyForAnother(sale, asked) {
  const other = { ...asked, lines: [{ sku: SKUS[0], quantity: 3 }] };
  const answer = insist(api.placeOrder(sale, other));
  check(answer, {
    'a key that meant something else is refused': ({ res, code }) => res.status === 422 && code === 'idempotency-key-reused',
  });
}
