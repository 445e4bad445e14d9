// What a sale is made of: baskets of several SKUs that are paid in time, late, twice or in part, by
// the caller or by what the payment provider says, given back, cancelled by a caller who never got
// its answer, returned, or left to run out, while an operator corrects the stock. In the end nothing
// is held, and every payment bought or must be given back.
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import * as api from './lib/api.js';
import { defineSale, setting, waitFor, waitUntilNothingIsHeld, watchStock } from './lib/sale.js';
import {
  adjust, begin, cancel, cancelWithKey, confirm, confirmByWebhook, failByWebhook, insist, layTombstone, place,
  sameLines, settleRefund, takeBack,
} from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

const UNITS = setting('STOCK', 1000);
const RATE = setting('RATE', 150);
const SECONDS = setting('SECONDS', 20);
const VUS = setting('VUS', 400);
const HOLD_SECONDS = setting('HOLD_SECONDS', 3);
// The contract gives expired stock a second to be back; a loaded machine gets more to prove it.
const LATE_SECONDS = 30;

// One that runs short, so that there are refusals, one with a limit of its own, and one of which
// there are so few that who pays late finds it gone.
const STOCK = [
  { sku: 'hoodie', stock: 2 * UNITS },
  { sku: 'cap', stock: 2 * UNITS },
  { sku: 'poster', stock: 2 * UNITS, per_buyer_limit: 2 },
  { sku: 'pin', stock: 4 * UNITS },
  { sku: 'vinyl', stock: Math.ceil(UNITS / 5) },
  { sku: 'signed', stock: Math.ceil(UNITS / 100) },
];
const SKUS = STOCK.map(({ sku }) => sku);
const IN_BASKETS = SKUS.filter((sku) => sku !== 'signed');
// So few that some come back until their limit stops them.
const BUYERS = Math.ceil((RATE * SECONDS) / 2);

/** Buyers by what they do, `{fate}`, and what became of them, `{end}`. */
const fates = new Counter('fates');
const ENDS = ['paid', 'reacquired', 'refund-due', 'cancelled', 'expired', 'returned', 'no-order', 'refused', 'unknown'];
// Of all buyers so many do this; `comes`: the ends that a run of the usual size must have seen, or
// the mix is not what it is called.
const FATES = {
  'pays-in-time': { share: 18, fate: withOrder(payInTime), comes: ['paid'] },
  'pays-for-a-part': { share: 6, fate: withOrder(payForAPart), comes: ['paid'] },
  'pays-by-webhook': { share: 6, fate: withOrder(payByWebhook), comes: ['paid'] },
  'fails-and-pays-again': { share: 5, fate: withOrder(failAndPayAgain), comes: ['paid'] },
  'pays-twice': { share: 4, fate: withOrder(payTwice), comes: ['refund-due'] },
  'pays-at-the-last-moment': { share: 5, fate: withOrder(payAtTheLastMoment), comes: ['paid', 'reacquired'] },
  'pays-late': { share: 9, fate: payLate, comes: ['reacquired', 'refund-due'] },
  'gives-back': { share: 8, fate: withOrder(giveBack), comes: ['cancelled'] },
  'gives-back-by-key': { share: 6, fate: withOrder(giveBackByKey), comes: ['cancelled'] },
  'gives-back-before-it-came': { share: 4, fate: changeMindBefore, comes: ['cancelled', 'refund-due'] },
  'pays-and-gives-back': { share: 6, fate: withOrder(payAndGiveBackAtOnce), comes: ['paid', 'refund-due'] },
  'pays-what-was-given-back': { share: 4, fate: withOrder(payWhatWasGivenBack), comes: ['refund-due'] },
  'returns': { share: 8, fate: withOrder(bringBack), comes: ['returned', 'paid', 'refund-due'] },
  'walks-away': { share: 8, fate: withOrder(walkAway), comes: ['expired', 'no-order'] },
  'comes-back-too-late': { share: 4, fate: withOrder(comeBackTooLate), comes: ['expired', 'cancelled'] },
  'walks-away-while-paying': { share: 4, fate: withOrder(walkAwayWhilePaying), comes: ['expired'] },
};
const SHARES = Object.values(FATES).reduce((sum, { share }) => sum + share, 0);
const USUAL_BUYERS = 2000;

function endsOf({ comes }) {
  const mustCome = RATE * SECONDS >= USUAL_BUYERS ? comes : [];
  return Object.fromEntries(ENDS.map((end) => [end, mustCome.includes(end) ? 'count>0' : 'count>=0']));
}

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
}, Object.fromEntries(Object.entries(FATES).map(([name, fate]) => [name, endsOf(fate)])));

export function setup() {
  const definition = {
    hold_seconds: HOLD_SECONDS,
    payment_grace_seconds: HOLD_SECONDS,
    per_buyer_limit: 6,
    skus: STOCK,
  };
  return { sale: defineSale('lifecycle', definition) };
}

export function watch({ sale }) {
  watchStock(sale);
}

export function teardown({ sale }) {
  waitUntilNothingIsHeld(sale, 2 * HOLD_SECONDS + LATE_SECONDS);
}

// ---- buyers

export function buy({ sale }) {
  const n = exec.scenario.iterationInTest;
  const asked = { buyer: `buyer-${Math.floor(Math.random() * BUYERS)}`, key: `order-${n}`, lines: basket() };
  let dice = Math.random() * SHARES;
  const [name, { fate }] = Object.entries(FATES).find(([, { share }]) => (dice -= share) < 0);
  fates.add(1, { fate: name, end: fate(sale, asked, n) });
}

function basket() {
  const size = [1, 1, 1, 2, 2, 3][Math.floor(Math.random() * 6)];
  const skus = [...IN_BASKETS].sort(() => Math.random() - 0.5).slice(0, size);
  return skus.map((sku) => ({ sku, quantity: Math.random() < 0.8 ? 1 : 2 }));
}

/** Some of these lines, or all where there is but one unit. */
function part(lines) {
  if (lines.length > 1) return lines.slice(1);
  return [{ sku: lines[0].sku, quantity: Math.ceil(lines[0].quantity / 2) }];
}

const sleepUntil = (ms) => sleep(Math.max(0, ms - Date.now()) / 1000);
const thinkingTime = () => sleep((Math.random() * HOLD_SECONDS) / 4);
const isSold = (end) => end === 'paid' || end === 'reacquired';
/** Every other payment is told by the provider. */
const payment = (n) => (n % 2 === 0 ? confirm : confirmByWebhook);

/** What a buyer does with an order, if there is one. */
function withOrder(fate) {
  return (sale, asked, n) => {
    const order = place(sale, asked);
    return order === null ? 'no-order' : fate(sale, order, n, asked);
  };
}

function payInTime(sale, held, n, asked) {
  let order = held;
  thinkingTime();
  if (n % 2 === 0) order = begin(sale, order, `payment-${n}`) || order;
  thinkingTime();
  const end = confirm(order, `payment-${n}`);
  if (end === 'paid' && n % 4 === 0) staysPaid(sale, order, n, asked);
  return end;
}

function staysPaid(sale, order, n, asked) {
  check(insist(api.confirmOrder(order.id, `payment-${n}`, part(order.lines))), {
    'the same payment again changes nothing': ({ res, body }) =>
      res.status === 200 && body.status === 'confirmed' && sameLines(body.lines, order.lines),
  });
  check(insist(api.cancelOrder(order.id)), {
    'what is paid is not cancelled': ({ res, code }) => res.status === 409 && code === 'order-confirmed',
  });
  check(insist(api.beginPayment(order.id, `other-${n}`)), {
    'what is paid begins no payment': ({ res, code }) => res.status === 409 && code === 'order-confirmed',
  });
  check(insist(api.placeOrder(sale, asked)), {
    'its key finds a paid order with 200': ({ res, body, replayed }) =>
      res.status === 200 && replayed && body.id === order.id && body.status === 'confirmed',
  });
}

function payForAPart(sale, order, n, asked) {
  thinkingTime();
  const lines = part(order.lines);
  const end = payment(n)(order, `payment-${n}`, { lines });
  if (end === 'paid') {
    check(insist(api.placeOrder(sale, asked)), {
      'its key finds an order that was bought in part': ({ res, body, replayed }) =>
        res.status === 200 && replayed && body.id === order.id && sameLines(body.lines, lines),
    });
  }
  return end;
}

/** The provider says it twice, says it again later, and says at last that it failed. */
function payByWebhook(sale, held, n) {
  const name = `payment-${n}`;
  const order = begin(sale, held, name) || held;
  const success = api.payment('succeeded', order.id, name);
  const failure = api.payment('failed', order.id, name);
  // What came too early changes nothing, for it is not this payment that runs.
  if (n % 3 === 0) hear(api.payment('failed', order.id, `other-${n}`));
  const early = n % 3 === 1 ? api.sendTogether([api.deliver(success), api.deliver(success)]) : [];
  const end = confirmByWebhook(order, name, { early });
  hear(success);
  hear(success, { late_seconds: 240 });
  hear(failure);
  if (end === 'paid') {
    check(insist(api.getOrder(order.id)), {
      'deliveries again and out of order change nothing': ({ body }) =>
        body.status === 'confirmed' && body.payment_id === name && sameLines(body.lines, order.lines),
    });
  }
  return end;
}

function hear(delivery, how) {
  check(insist(api.deliver(delivery, how)), { 'what is signed is 204': ({ res }) => res.status === 204 });
}

function failAndPayAgain(sale, held, n) {
  const paying = begin(sale, held, `declined-${n}`);
  if (paying === null || !failByWebhook(paying, `declined-${n}`)) return confirm(held, `payment-${n}`);
  thinkingTime();
  const order = begin(sale, paying, `payment-${n}`) || paying;
  hear(api.payment('failed', order.id, `declined-${n}`));
  return payment(n)(order, `payment-${n}`);
}

/** Two payments run at once: one buys, the other must be given back. */
function payTwice(sale, order, n) {
  const end = payment(n)(order, `payment-${n}`);
  if (end !== 'paid') return end;
  return mustBeGivenBack(order, `again-${n}`, n, ['already-paid']);
}

/** What is due once stays due; every other is given back by the shop. */
function mustBeGivenBack(order, name, n, codes) {
  let told = null;
  const end = confirm(order, name, { told: (answer) => { told = answer; } });
  if (end !== 'refund-due') return end;
  check(told, { 'why a payment buys nothing': ({ code }) => codes.includes(code) });
  staysDue(order, name, told);
  if (n % 2 === 0) settleRefund(told.body.refund_id);
  if (n % 4 === 0) staysDue(order, name, told);
  return end;
}

function staysDue(order, name, told) {
  hear(api.payment('succeeded', order.id, name));
  check(insist(api.confirmOrder(order.id, name)), {
    'a refund once due stays due': ({ res, code, body }) =>
      res.status === 409 && code === told.code && body.refund_id === told.body.refund_id,
  });
}

/** On the very deadline either is right, and only one. */
function payAtTheLastMoment(sale, order, n) {
  sleepUntil(Date.parse(order.expires_at) + 200 * (Math.random() - 0.5));
  const end = payment(n)(order, `payment-${n}`);
  check(insist(api.getOrder(order.id)), {
    'a race of payment and deadline has one end': ({ body }) => body.status === (isSold(end) ? 'confirmed' : 'expired'),
  });
  return end;
}

/** Whether the stock is still there decides: of what is rare somebody else has it by then. */
function payLate(sale, asked, n) {
  const rare = { ...asked, lines: [{ sku: 'signed', quantity: 1 }] };
  return withOrder(payExpired)(sale, n % 5 < 3 ? rare : asked, n);
}

function payExpired(sale, order, n) {
  if (!runsOut(order)) return 'unknown';
  thinkingTime();
  if (n % 2 === 0) return mustBeGivenBack(order, `payment-${n}`, n, ['payment-too-late']);
  return confirmByWebhook(order, `payment-${n}`, { lines: n % 3 === 0 ? part(order.lines) : undefined });
}

function giveBack(sale, order, n, asked) {
  thinkingTime();
  if (!cancel(order)) return 'unknown';
  staysCancelled(sale, order, asked);
  return 'cancelled';
}

function giveBackByKey(sale, order, n, asked) {
  if (!cancelWithKey(sale, asked, order)) return 'unknown';
  staysCancelled(sale, order, asked);
  return 'cancelled';
}

function staysCancelled(sale, order, asked) {
  check(insist(api.cancelOrder(order.id)), {
    'cancelling again changes nothing': ({ res, body }) => res.status === 200 && body.status === 'cancelled',
  });
  check(insist(api.placeOrder(sale, asked)), {
    'a cancelled order is not sold to its key': ({ res, code, body }) =>
      res.status === 409 && code === 'order-cancelled' && body.order.id === order.id,
  });
}

/** The cancel overtakes its order: what comes later with this key must not hold stock, nor be paid. */
function changeMindBefore(sale, asked, n) {
  const tombstone = layTombstone(sale, asked);
  if (tombstone === null) return 'unknown';
  const order = place(sale, asked);
  check(order, { 'an order cancelled before it came is not held': (none) => none === null });
  return n % 3 === 0 ? mustBeGivenBack(tombstone, `payment-${n}`, n, ['order-cancelled']) : 'cancelled';
}

function payAndGiveBackAtOnce(sale, order, n) {
  const name = `payment-${n}`;
  const byWebhook = n % 2 === 1;
  const pays = byWebhook ? api.deliver(api.payment('succeeded', order.id, name)) : api.confirmOrder(order.id, name);
  const [paid, given] = api.sendTogether([pays, api.cancelOrder(order.id)]);
  const end = payment(n)(order, name, { early: [paid] });
  const cancelled = cancel(order, { early: [given] });
  check(end, { 'a race of payment and cancel has one end': () => isSold(end) !== cancelled });
  return end;
}

function payWhatWasGivenBack(sale, order, n) {
  if (!cancel(order)) return 'unknown';
  thinkingTime();
  if (n % 2 === 0) return mustBeGivenBack(order, `payment-${n}`, n, ['order-cancelled']);
  return confirmByWebhook(order, `payment-${n}`);
}

function bringBack(sale, held, n) {
  let order = null;
  const end = payment(n)(held, `payment-${n}`, { told: ({ body }) => { order = body; } });
  if (end !== 'paid') return end;
  const all = n % 3 > 0;
  const back = { key: 'first', lines: all ? undefined : part(order.lines), restock: n % 2 === 0 };
  const kept = takeBack(order, back);
  if (kept === null) return 'unknown';
  check(insist(api.returnOrder(order.id, back)), {
    'a return with the same key is the same': ({ res, body, replayed }) =>
      res.status === 200 && replayed && sameLines(body.returned, kept.returned),
  });
  check(insist(api.returnOrder(order.id, { ...back, key: 'too-much', lines: order.lines })), {
    'no more comes back than was bought': ({ res, code }) =>
      res.status === 409 && code === (kept.status === 'returned' ? 'order-returned' : 'return-exceeds-order'),
  });
  if (kept.status === 'confirmed' && n % 4 === 0) return takeBack(kept, { key: 'rest', restock: false }) ? 'returned' : 'unknown';
  if (kept.status === 'confirmed') return 'paid';
  hear(api.payment('succeeded', order.id, `payment-${n}`));
  return n % 5 === 0 ? mustBeGivenBack(order, `again-${n}`, n, ['already-paid']) : 'returned';
}

function walkAway() {
  return 'expired';
}

function comeBackTooLate(sale, order, n, asked) {
  if (!runsOut(order)) return 'unknown';
  check(insist(api.placeOrder(sale, asked)), {
    'an expired order is not sold to its key': ({ res, code }) => res.status === 409 && code === 'order-expired',
  });
  return n % 2 === 0 && cancel(order) ? 'cancelled' : 'expired';
}

/** A payment that runs holds longer, and not for ever. */
function walkAwayWhilePaying(sale, order, n) {
  thinkingTime();
  const paying = begin(sale, order, `payment-${n}`);
  if (paying === null) return 'expired';
  sleepUntil(Date.parse(order.expires_at));
  const seen = insist(api.getOrder(order.id));
  // Clocks may differ a little, and an answer may come late.
  if (Date.now() < Date.parse(paying.expires_at) - 250) {
    check(seen, { 'a payment that runs keeps its hold': ({ body }) => body.status === 'paying' });
  }
  return runsOut(paying) ? 'expired' : 'unknown';
}

function runsOut(order) {
  sleepUntil(Date.parse(order.expires_at));
  const expired = waitFor(LATE_SECONDS, () => {
    const seen = insist(api.getOrder(order.id));
    return seen.kind === 'done' && seen.body.status === 'expired';
  });
  check(expired, { 'a hold that is not paid runs out': (came) => came });
  return expired;
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
