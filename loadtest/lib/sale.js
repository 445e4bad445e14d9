// A sale of the run's own: set up before, watched meanwhile, waited for at the end.
import { check, fail, sleep } from 'k6';
import * as api from './api.js';

const PAUSE_SECONDS = 0.2;

/** Settings of a scenario come from `LOAD_…`; `HOLDFAST_…` are the service's own. */
export function setting(name, fallback) {
  const value = __ENV[`LOAD_${name}`];
  if (value === undefined || value === '') return fallback;
  const number = Number(value);
  if (!(number > 0)) throw new Error(`LOAD_${name} must be a number above 0, not ${value}`);
  return number;
}

/** An id that no other run has, and that tells which run it was. */
export function saleId(scenario) {
  const when = new Date().toISOString().slice(0, 19).replace(/[-:]/g, '');
  return `${scenario}-${when}-${Math.random().toString(36).slice(2, 8)}`;
}

/**
 * For setup(): defines the sale, or fails the run. What it answers is handed to every iteration,
 * and to the books by way of the summary.
 */
export function defineSale(scenario, definition) {
  const id = saleId(scenario);
  const answer = api.read(api.send(api.putSale(id, { name: `Load test ${scenario}`, ...definition })));
  if (answer.kind !== 'done' || answer.res.status !== 201) {
    fail(`the sale could not be defined: ${answer.res.status} ${answer.res.error || answer.res.body}`);
  }
  const { hold_seconds, max_hold_seconds, per_buyer_limit, skus } = answer.body;
  return { scenario, id, hold_seconds, max_hold_seconds, per_buyer_limit: per_buyer_limit || null, skus };
}

/** The counters by SKU as they stand now, or null where the service did not say. */
export function stock(sale) {
  const answer = api.read(api.send(api.getStock(sale.id)));
  if (answer.kind !== 'done') return null;
  return Object.fromEntries(answer.body.skus.map((counters) => [counters.sku, counters]));
}

/** Never sold more than there is, in every state that can be seen: one look. */
export function watchStock(sale) {
  const seen = stock(sale);
  if (seen === null) return; // whether it may be away is judged by those who order
  check(seen, {
    'available + held + sold = total, none below zero': (counters) =>
      Object.values(counters).every(
        ({ total, available, held, sold }) =>
          available >= 0 && held >= 0 && sold >= 0 && available + held + sold === total,
      ),
  });
}

/** Waits for a condition; false when it did not come true in time. */
export function waitFor(seconds, condition) {
  const deadline = Date.now() + seconds * 1000;
  while (!condition()) {
    if (Date.now() > deadline) return false;
    sleep(PAUSE_SECONDS);
  }
  return true;
}

/** For teardown(): every hold is paid, given back or run out in the end. */
export function waitUntilNothingIsHeld(sale, seconds) {
  const nothingHeld = () => {
    const counters = stock(sale);
    return counters !== null && Object.values(counters).every(({ held }) => held === 0);
  };
  check(waitFor(seconds, nothingHeld), { 'in the end nothing is held': (came) => came });
}
