// The steps that change something, each asked until the service has said what became of it, and
// counted for the books: once per step, however often it was sent.
import { check, sleep } from 'k6';
import crypto from 'k6/crypto';
import { Counter } from 'k6/metrics';
import * as api from './api.js';
import { waitFor } from './sale.js';

/**
 * Steps asked, done, refused, and payments that succeeded and must be given back (`refund`):
 * `{step, outcome}`. What is asked and none of these, is unknown.
 */
export const steps = new Counter('steps');
/** Units moved by steps that were done: `{step, sku}`. */
export const units = new Counter('units');
/** Sums over what was answered: `{of, half}`. They say *which* orders and payments without a list of them. */
export const fingerprints = new Counter('fingerprints');
/** Refusals by `{code}`. */
export const refusals = new Counter('refusals');
/** Requests that were not answered, or answered by "perhaps", by `{code}`. */
export const lost = new Counter('lost');
/** Answers that the contract does not have there, by `{code}`. */
export const unexpected = new Counter('unexpected');

export const STEPS = ['place', 'begin', 'confirm', 'fail', 'cancel', 'tombstone', 'return', 'settle', 'adjust'];
export const OUTCOMES = ['asked', 'done', 'refund', 'refused'];
/** Orders by id; payments (confirm, refund) by order and payment; units (bought, returned) by buyer and SKU. */
export const FINGERPRINTS = ['place', 'confirm', 'refund', 'cancel', 'tombstone', 'bought', 'returned'];

/** A drill that takes parts away meanwhile says so: then a lost answer is no fault of its own. */
export const FAULTS = Boolean(__ENV.LOAD_FAULTS);

// How long to go on asking. Longer than any part is away in a drill.
const PATIENCE_MS = 1000 * Number(__ENV.LOAD_PATIENCE_SECONDS || 45);
// A refusal proves that an unanswered request before it did nothing only once that one can no
// longer be on its way.
const IN_FLIGHT_MS = 3000;
const PAUSE_SECONDS = 0.2;

const SURPRISES_SHOWN = 5;
let surprises = 0;

function surprise(step, answer) {
  unexpected.add(1, { code: answer.code || 'none' });
  surprises += 1;
  if (surprises > SURPRISES_SHOWN) return;
  const { status, body } = answer.res;
  console.error(`unexpected answer to ${step}: ${status} ${answer.code || ''} ${String(body).slice(0, 400)}`);
}

// Being turned away is right under load, and for want of a part only where a drill took it.
function awayIsExpected(code) {
  return code === 'overloaded' || (FAULTS && (code === 'unavailable' || code === 'lane-frozen'));
}

function note(step, answer, refusals_expected) {
  if (answer.kind === 'unknown') {
    lost.add(1, { code: answer.code });
    // The contract's "perhaps" is one code; a bare 5xx or `internal` is a fault even in a drill.
    if (answer.code !== 'no-answer' && answer.code !== 'outcome-unknown') surprise(step, answer);
  } else if (answer.kind === 'away') {
    if (!awayIsExpected(answer.code)) surprise(step, answer);
  } else if (answer.kind === 'refused' && !refusals_expected.includes(answer.code)) {
    surprise(step, answer);
  }
}

/**
 * Asks until it is told: `done`, `refused`, `away` (turned away, which ends only what may be
 * given up) or `unknown`. `early` are responses that this very request already got, for a
 * scenario that sent it several times at once; `gives_up`: a buyer who is turned away leaves.
 */
function ask(step, request, refusals_expected, { early = [], gives_up = false, timeout_ms } = {}) {
  steps.add(1, { step, outcome: 'asked' });
  const told = settle(step, request, refusals_expected, early, gives_up, timeout_ms);
  if (told.kind === 'done') {
    steps.add(1, { step, outcome: 'done' });
  } else if (told.kind !== 'unknown') {
    steps.add(1, { step, outcome: step === 'confirm' && told.body && told.body.refund_id ? 'refund' : 'refused' });
    refusals.add(1, { code: told.code });
  }
  return told;
}

function settle(step, request, refusals_expected, early, gives_up, timeout_ms) {
  const started = Date.now();
  let lost_at = null;
  let sent = 0;
  let first_timeout_ms = timeout_ms;
  const waiting = early.map(api.read);
  // Of answers to the same request at once, the best says what became of it.
  waiting.sort((a, b) => rank(a) - rank(b));

  for (;;) {
    const answer = waiting.length > 0 ? waiting.shift() : api.read(api.send(request, first_timeout_ms));
    // A caller that did not wait has itself to blame for the first loss.
    const own_doing = first_timeout_ms !== undefined && answer.code === 'no-answer';
    if (!own_doing) note(step, answer, refusals_expected);
    first_timeout_ms = undefined;
    sent += 1;
    const now = Date.now();
    if (answer.kind === 'unknown') lost_at = now;

    const decisive = lost_at === null || now - lost_at > IN_FLIGHT_MS;
    if (answer.kind === 'done') return { ...answer, sent };
    if (lost_at !== null && answer.code === 'order-expired' && step === 'place') {
      // It was held when nobody heard, and ran out before anybody asked again.
      return { ...answer, kind: 'done', body: answer.body.order, sent };
    }
    if (answer.kind === 'refused' && decisive && waiting.length === 0) return { ...answer, sent };
    // Being turned away says nothing about what was sent before.
    if (answer.kind === 'away' && gives_up && lost_at === null && waiting.length === 0) return { ...answer, sent };
    if (now - started > PATIENCE_MS) return { ...answer, kind: lost_at === null ? answer.kind : 'unknown', sent };
    if (waiting.length === 0) sleep(PAUSE_SECONDS);
  }
}

/** Sends what changes nothing (any more) until it is answered: for looking at what it says. */
export function insist(request) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const answer = api.read(api.send(request));
    if (answer.kind === 'done' || answer.kind === 'refused' || Date.now() > deadline) return answer;
    note('a question', answer, []);
    sleep(PAUSE_SECONDS);
  }
}

function rank(answer) {
  return ['done', 'unknown', 'refused', 'away'].indexOf(answer.kind);
}

function countLines(step, lines) {
  for (const { sku, quantity } of lines) units.add(quantity, { step, sku });
}

// 32 bits a half: the sum over two million of them is still an exact double.
function countFingerprint(of, text, times = 1) {
  const digest = crypto.md5(text, 'hex');
  fingerprints.add(times * parseInt(digest.slice(0, 8), 16), { of, half: 'first' });
  fingerprints.add(times * parseInt(digest.slice(8, 16), 16), { of, half: 'second' });
}

function countOrder(step, order) {
  countFingerprint(step, order.id);
  countLines(step, order.lines);
}

function countBought(order) {
  countFingerprint('confirm', `${order.id} ${order.payment_id}`);
  countLines('confirm', order.lines);
  for (const { sku, quantity } of order.lines) countFingerprint('bought', `${order.buyer_id} ${sku}`, quantity);
}

function countReturned(order, lines, restock) {
  countLines('return', lines);
  if (!restock) countLines('scrap', lines);
  for (const { sku, quantity } of lines) countFingerprint('returned', `${order.buyer_id} ${sku}`, quantity);
}

// ---- the steps

const PLACE_REFUSALS = [
  'sold-out', 'purchase-limit', 'sale-paused', 'sale-closed', 'sale-not-open', 'order-cancelled', 'order-expired',
];
const BEGIN_REFUSALS = ['order-cancelled', 'order-expired', 'order-confirmed', 'order-returned'];
const CONFIRM_REFUSALS = ['order-cancelled', 'payment-too-late', 'already-paid'];
const CANCEL_REFUSALS = ['order-confirmed', 'order-returned'];

/** Answers the order, or null where the buyer has none. `how.told` gets the whole answer. */
export function place(sale, order, how = {}) {
  const answer = ask('place', api.placeOrder(sale, order), PLACE_REFUSALS, { gives_up: true, ...how });
  if (how.told) how.told(answer);
  if (answer.kind !== 'done') return null;
  if (answer.code === 'order-expired') {
    countOrder('place', answer.body);
    return null;
  }
  check(answer, {
    'an order is held as it was asked for': ({ res, body }) =>
      res.status === 201 && body.status === 'held' && body.buyer_id === order.buyer && sameLines(body.lines, order.lines),
    'only what was sent before is a replay': ({ replayed, sent }) => !replayed || sent > 1 || Boolean(how.resent),
  });
  countOrder('place', answer.body);
  return answer.body;
}

/** Answers the order, or null where it has no payment that runs. */
export function begin(sale, order, payment_id) {
  const answer = ask('begin', api.beginPayment(order.id, payment_id), BEGIN_REFUSALS);
  if (answer.kind !== 'done') return null;
  check(answer, {
    'a payment that runs keeps the hold, and never longer than the sale lets it': ({ res, body }) => {
      const until = Date.parse(body.expires_at);
      return (
        res.status === 200 && body.id === order.id && body.status === 'paying' && body.payment_id === payment_id &&
        until >= Date.parse(order.expires_at) && until <= Date.parse(body.created_at) + 1000 * sale.max_hold_seconds
      );
    },
  });
  return answer.body;
}

/**
 * Says that a payment succeeded. Each payment of an order once: what is said again is no step.
 * `how`: `lines`, where it pays for a part; `early`, see `ask`; `told` gets the whole answer.
 * Answers what came of it: `paid`, `reacquired` (paid after the deadline), `refund-due`, `refused`
 * or `unknown`.
 */
export function confirm(order, payment_id, how = {}) {
  const answer = ask('confirm', api.confirmOrder(order.id, payment_id, how.lines), CONFIRM_REFUSALS, how);
  if (how.told) how.told(answer);
  if (answer.kind === 'done') return bought(order, payment_id, how, answer);
  if (answer.kind === 'unknown') return 'unknown';
  const refund = answer.body && answer.body.refund_id;
  if (answer.kind === 'refused') {
    check(answer, {
      'a payment that buys nothing must be given back': ({ body }) =>
        String(refund).startsWith('rfd_') && body.order.id === order.id,
    });
  }
  if (!refund) return 'refused';
  countFingerprint('refund', `${order.id} ${payment_id}`);
  return 'refund-due';
}

/** The same, said by the payment provider. */
export function confirmByWebhook(order, payment_id, how = {}) {
  steps.add(1, { step: 'confirm', outcome: 'asked' });
  const delivery = api.deliver(api.payment('succeeded', order.id, payment_id, how.lines));
  const heard = settle('confirm', delivery, [], how.early || [], false);
  if (heard.kind === 'unknown') return 'unknown';
  if (heard.kind !== 'done') {
    steps.add(1, { step: 'confirm', outcome: 'refused' });
    return 'refused';
  }
  check(heard, { 'what the provider signed is 204, whatever comes of it': ({ res }) => res.status === 204 });
  // What came of it the order says.
  const seen = insist(api.getOrder(order.id));
  if (how.told) how.told(seen);
  if (seen.kind !== 'done') return 'unknown';
  if (seen.body.payment_id === payment_id && ['confirmed', 'returned'].includes(seen.body.status)) {
    steps.add(1, { step: 'confirm', outcome: 'done' });
    return bought(order, payment_id, how, seen);
  }
  steps.add(1, { step: 'confirm', outcome: 'refund' });
  countFingerprint('refund', `${order.id} ${payment_id}`);
  return 'refund-due';
}

function bought(order, payment_id, { lines = order.lines }, answer) {
  check(answer, {
    'a confirmed order is the one that was held, and names its payment': ({ res, body }) =>
      res.status === 200 && body.id === order.id && body.status === 'confirmed' &&
      body.payment_id === payment_id && sameLines(body.lines, lines),
    'reacquired is what was paid after its deadline': ({ body }) =>
      body.reacquired === (Date.parse(body.confirmed_at) >= Date.parse(body.expires_at)),
  });
  countBought(answer.body);
  return answer.body.reacquired ? 'reacquired' : 'paid';
}

/** The provider says that the payment that runs has failed. True where the order is held again. */
export function failByWebhook(order, payment_id) {
  steps.add(1, { step: 'fail', outcome: 'asked' });
  const heard = settle('fail', api.deliver(api.payment('failed', order.id, payment_id)), [], [], false);
  const seen = heard.kind === 'done' ? insist(api.getOrder(order.id)) : heard;
  // Of an order that has run out nobody can say which came first.
  if (seen.kind !== 'done' || seen.body.status === 'expired') return false;
  const held = seen.body.status === 'held' && seen.body.payment_id === null;
  check(held, { 'a payment that fails ends itself, and not the hold': (ended) => ended });
  steps.add(1, { step: 'fail', outcome: held ? 'done' : 'refused' });
  return held;
}

/** `back`: `{key, lines, restock}`. Answers the order, or null where it was not taken back. */
export function takeBack(order, back) {
  const answer = ask('return', api.returnOrder(order.id, back), []);
  if (answer.kind !== 'done') return null;
  const left = without(order.lines, order.returned);
  const lines = back.lines || left;
  const rest = without(left, lines);
  check(answer, {
    'a return leaves what was not taken back': ({ res, body }) =>
      res.status === 200 && body.id === order.id && sameLines(without(body.lines, body.returned), rest) &&
      body.status === (rest.length === 0 ? 'returned' : 'confirmed'),
  });
  countReturned(order, lines, back.restock);
  return answer.body;
}

/** Says that the payment was given back, as soon as the work list has it. */
export function settleRefund(id) {
  steps.add(1, { step: 'settle', outcome: 'asked' });
  let answer = null;
  waitFor(PATIENCE_MS / 1000, () => {
    answer = insist(api.settleRefund(id));
    return answer.kind === 'done';
  });
  if (answer.kind === 'done') steps.add(1, { step: 'settle', outcome: 'done' });
  check(answer, {
    'a refund that is due can be settled': ({ kind, body }) =>
      kind === 'done' && body.id === id && body.status === 'settled' && body.settled_at !== null,
  });
}

/** True where the order is cancelled now. */
export function cancel(order, how = {}) {
  const answer = ask('cancel', api.cancelOrder(order.id), CANCEL_REFUSALS, how);
  if (how.told) how.told(answer);
  return countCancel(answer, order);
}

/** The same by its key, as a caller does who never saw the order. */
export function cancelWithKey(sale, asked, order) {
  return countCancel(ask('cancel', api.cancelByKey(sale, asked), CANCEL_REFUSALS), order);
}

function countCancel(answer, order) {
  if (answer.kind !== 'done') return false;
  check(answer, {
    'a cancelled order is the one that was held, and keeps its lines': ({ res, body }) =>
      res.status === 200 && body.id === order.id && body.status === 'cancelled' && sameLines(body.lines, order.lines),
  });
  countOrder('cancel', answer.body);
  return true;
}

/** Cancels an order that never was: the one that comes later with this key must be refused. Answers it, or null. */
export function layTombstone(sale, asked) {
  const answer = ask('tombstone', api.cancelByKey(sale, asked), []);
  if (answer.kind !== 'done') return null;
  check(answer, {
    'a tombstone is a cancelled order without lines': ({ res, body }) =>
      res.status === 200 && body.status === 'cancelled' && body.lines.length === 0,
  });
  countOrder('tombstone', answer.body);
  return answer.body;
}

/** `change`: `{sku, key, delta, reason, …}`. */
export function adjust(sale, change) {
  return adjustBy(change.delta, change.sku, api.adjustStock(sale, change));
}

/** `change`: `{sku, key, set_total, version, reason, …}`; `delta`: what it must come to. */
export function setTotal(sale, change, delta) {
  return adjustBy(delta, change.sku, api.setTotal(sale, change));
}

export function undo(adjustment, key) {
  return adjustBy(-adjustment.delta, adjustment.sku, api.undoAdjustment(adjustment.id, key));
}

function adjustBy(delta, sku, request) {
  const answer = ask('adjust', request, ['stock-in-use']);
  if (answer.kind !== 'done') return null;
  check(answer, {
    'an adjustment says what it moved': ({ body }) =>
      body.delta === delta && body.sku === sku &&
      body.after.total - body.before.total === delta &&
      body.after.available - body.before.available === delta,
  });
  units.add(Math.abs(delta), { step: delta > 0 ? 'restock' : 'write-off', sku });
  return answer.body;
}

/** Order of lines and of members does not matter. */
export function sameLines(some, others) {
  const text = (lines) => lines.map(({ sku, quantity }) => `${sku} ${quantity}`).sort().join();
  return Array.isArray(some) && text(some) === text(others);
}

/** What is left of some lines without others. */
export function without(lines, taken) {
  return lines
    .map(({ sku, quantity }) => ({
      sku,
      quantity: taken.filter((line) => line.sku === sku).reduce((left, line) => left - line.quantity, quantity),
    }))
    .filter(({ quantity }) => quantity !== 0);
}
