// The steps that change something, each asked until the service has said what became of it, and
// counted for the books: once per step, however often it was sent.
import { check, sleep } from 'k6';
import crypto from 'k6/crypto';
import { Counter } from 'k6/metrics';
import * as api from './api.js';

/** Steps asked, done and refused: `{step, outcome}`. What is asked and neither, is unknown. */
export const steps = new Counter('steps');
/** Units moved by steps that were done: `{step, sku}`. */
export const units = new Counter('units');
/** Sums over the ids of orders: `{step, half}`. They say *which* orders without a list of them. */
export const fingerprints = new Counter('fingerprints');
/** Refusals by `{code}`. */
export const refusals = new Counter('refusals');
/** Requests that were not answered, or answered by "perhaps", by `{code}`. */
export const lost = new Counter('lost');
/** Answers that the contract does not have there, by `{code}`. */
export const unexpected = new Counter('unexpected');

export const STEPS = ['place', 'confirm', 'cancel', 'tombstone', 'adjust'];

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
    steps.add(1, { step, outcome: 'refused' });
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

function countOrder(step, order) {
  // 32 bits a half: the sum over two million orders is still an exact double.
  const digest = crypto.md5(order.id, 'hex');
  fingerprints.add(parseInt(digest.slice(0, 8), 16), { step, half: 'first' });
  fingerprints.add(parseInt(digest.slice(8, 16), 16), { step, half: 'second' });
  countLines(step, order.lines);
}

// ---- the steps

const PLACE_REFUSALS = [
  'sold-out', 'purchase-limit', 'sale-paused', 'sale-closed', 'sale-not-open', 'order-cancelled', 'order-expired',
];
const SETTLE_REFUSALS = ['order-cancelled', 'order-confirmed', 'order-expired', 'payment-too-late', 'already-paid'];

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

/** `how.early`: see `ask`. True where the order is sold now. */
export function confirm(order, payment_id, how = {}) {
  const answer = ask('confirm', api.confirmOrder(order.id, payment_id), SETTLE_REFUSALS, how);
  if (how.told) how.told(answer);
  if (answer.kind !== 'done') return false;
  check(answer, {
    'a confirmed order is the one that was held, and names its payment': ({ res, body }) =>
      res.status === 200 && body.id === order.id && body.status === 'confirmed' &&
      body.payment_id === payment_id && body.confirmed_at !== null && sameLines(body.lines, order.lines),
  });
  countOrder('confirm', answer.body);
  return true;
}

/** True where the order is cancelled now. */
export function cancel(order, how = {}) {
  const answer = ask('cancel', api.cancelOrder(order.id), SETTLE_REFUSALS, how);
  if (how.told) how.told(answer);
  return countCancel(answer, order);
}

/** The same by its key, as a caller does who never saw the order. */
export function cancelWithKey(sale, asked, order) {
  return countCancel(ask('cancel', api.cancelByKey(sale, asked), SETTLE_REFUSALS), order);
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

/** Cancels an order that never was: the one that comes later with this key must be refused. */
export function layTombstone(sale, asked) {
  const answer = ask('tombstone', api.cancelByKey(sale, asked), []);
  if (answer.kind !== 'done') return false;
  check(answer, {
    'a tombstone is a cancelled order without lines': ({ res, body }) =>
      res.status === 200 && body.status === 'cancelled' && body.lines.length === 0,
  });
  countOrder('tombstone', answer.body);
  return true;
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
