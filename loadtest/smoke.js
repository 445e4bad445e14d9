// Every call of the API once or a few times, each answer looked at closely: one pass, in order, by
// one caller. The other scenarios press; this one reads.
import { check, sleep } from 'k6';
import * as api from './lib/api.js';
import { defineSale, saleId, stock, waitFor, waitUntilNothingIsHeld } from './lib/sale.js';
import {
  adjust, begin, cancel, cancelWithKey, confirm, confirmByWebhook, failByWebhook, layTombstone, place, sameLines, setTotal,
  settleRefund, takeBack, undo,
} from './lib/steps.js';
import { loadOptions } from './lib/summary.js';

export { handleSummary } from './lib/summary.js';

// Longer than the pass takes on any machine: what runs out here says so itself.
const HOLD_SECONDS = 120;
const GRACE_SECONDS = HOLD_SECONDS + 60;
const SALE = {
  hold_seconds: HOLD_SECONDS,
  payment_grace_seconds: GRACE_SECONDS,
  per_buyer_limit: 4,
  skus: [
    { sku: 'tea', stock: 50 },
    { sku: 'mug', stock: 50, per_buyer_limit: 2 },
    { sku: 'last-one', stock: 1 },
  ],
};

export const options = loadOptions(
  SALE.skus.map(({ sku }) => sku),
  { pass: { executor: 'per-vu-iterations', exec: 'pass', vus: 1, iterations: 1, maxDuration: '5m' } },
);

export function setup() {
  return { sale: defineSale('smoke', SALE) };
}

export function pass({ sale }) {
  theSaleIsShown(sale);
  aSaleIsDefinedAgain(sale);
  callersAreTold(sale);
  requestsAreRead(sale);
  faultsAreToldInOrder(sale);
  const open = anOrderIsHeld(sale);
  anOrderIsPaid(sale);
  aPaymentRuns(sale);
  aPartIsPaid(sale);
  whatWasSoldComesBack(sale);
  theProviderSaysIt(sale);
  anOrderIsGivenBack(sale);
  anOrderIsCancelledByItsKey(sale);
  aHoldRunsOut(sale);
  open.push(...limitsHold(sale));
  ordersAreListed(sale);
  paymentsAreGivenBack(sale);
  stockIsAdjusted(sale);
  stockIsCounted(sale);
  anAdjustmentIsUndone(sale);
  aSaleRests(sale);
  aSaleOpensLater();
  // What is left to settle is settled in a closed sale.
  const held = place(sale, ask('early-bird', { lines: one('tea') }));
  const paid = place(sale, ask('early-bird', { lines: one('mug') }));
  aSaleCloses(sale, paid);
  verify('settling goes on in a closed sale', confirm(paid, 'payment-closed') === 'paid');
  for (const order of [held, ...open]) verify('what is left is given back', cancel(order));
}

export function teardown({ sale }) {
  waitUntilNothingIsHeld(sale, 10);
}

// ---- words

let asked = 0;
/** An order that nobody else has asked for. */
function ask(buyer, order = {}) {
  asked += 1;
  return { buyer, key: `key-${asked}`, lines: one('tea'), ...order };
}

const one = (sku) => [{ sku, quantity: 1 }];
const get = (request) => api.read(api.send(request));

function verify(what, holds) {
  check(null, { [what]: () => Boolean(holds) });
}

/** A check that says what it got when it fails. */
function expect(what, answer, holds) {
  let ok = false;
  try {
    ok = Boolean(holds(answer));
  } catch (error) {
    console.error(`${what}: ${error}`);
  }
  check(null, { [what]: () => ok });
  if (!ok) console.error(`${what}: got ${answer.res.status} ${JSON.stringify(answer.res.headers)} ${answer.res.body}`);
  return answer.body;
}

const RFC3339_MILLIS = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
const isTime = (text) => RFC3339_MILLIS.test(text);
const isJson = ({ res }) => (res.headers['Content-Type'] || '').startsWith('application/json');

/** Refused with this status and code, as an RFC 9457 problem that has all it must have. */
function refused(what, request, status, code, more = () => true) {
  return expect(what, get(request), (answer) => {
    const { res, body } = answer;
    return (
      res.status === status && body.code === code && body.status === status &&
      res.headers['Content-Type'].startsWith('application/problem+json') &&
      ['type', 'title', 'detail', 'trace_id'].every((member) => typeof body[member] === 'string' && body[member] !== '') &&
      more(answer)
    );
  });
}

/** A payment that buys nothing, and the refund that is due for it: answers its id. */
function mustBeGivenBack(what, order, payment, code) {
  let answer = null;
  const end = confirm(order, payment, { told: (told) => { answer = told; } });
  verify(`${what} must be given back`, end === 'refund-due');
  return refused(what, api.confirmOrder(order.id, payment), 409, code, ({ body }) =>
    body.refund_id === answer.body.refund_id && answer.code === code && body.order.id === order.id).refund_id;
}

const withBody = (request, body) => ({ ...request, body: typeof body === 'string' ? body : JSON.stringify(body) });
const problemAt = (pointer) => ({ body }) => body.errors.some((error) => error.pointer === pointer && error.detail);

// ---- the pass

function theSaleIsShown(sale) {
  for (const path of ['/livez', '/readyz', '/openapi.json']) {
    expect(`${path} is open to all`, get(api.anyone('GET', path)), ({ res }) => res.status === 200);
  }
  expect('readyz says ready', get(api.anyone('GET', '/readyz')), ({ body }) => body.status === 'ready');
  const shown = get(api.anyone('GET', `/v1/sales/${sale.id}`));
  expect('a sale is shown to all', shown, ({ res, body }) =>
    res.status === 200 && body.id === sale.id && body.name === 'Load test smoke' && body.state === 'open' &&
    body.per_buyer_limit === 4 && body.skus.length === 3 &&
    body.skus.every(({ sku, available }) => typeof sku === 'string' && available >= 0));
  expect('a sale may be looked at from any origin, and is never stale', shown, ({ res }) =>
    res.headers['Access-Control-Allow-Origin'] === '*' && res.headers['Cache-Control'] === 'no-cache' && Boolean(res.headers.Etag));
  expect('unknown query parameters do no harm to what is open',
    get(api.anyone('GET', `/v1/sales/${sale.id}?from=newsletter`)), ({ res }) => res.status === 200);
  expect('open sales are listed', get(api.anyone('GET', '/v1/sales?state=open&limit=200')), ({ res, body }) =>
    res.status === 200 && Array.isArray(body.sales) && 'next_cursor' in body);
  expect('one page of sales leads to the next', get(api.anyone('GET', '/v1/sales?limit=1')), ({ body }) =>
    body.sales.length === 1);
  expect('the inside sees what is ready', get(api.inside('/readyz')), ({ res, body }) =>
    res.status === 200 && body.status === 'ready' && ['redis', 'kafka', 'database'].every((part) => part in body.parts));
  const metrics = api.send(api.inside('/metrics'));
  verify('the inside sees metrics, in OpenMetrics', metrics.status === 200 && metrics.body.trimEnd().endsWith('# EOF'));
  refused('metrics are not for the outside', api.anyone('GET', '/metrics'), 404, 'not-found');
  refused('a sale that is not', api.anyone('GET', '/v1/sales/no-such-sale'), 404, 'sale-not-found');
}

function aSaleIsDefinedAgain(sale) {
  const definition = { name: 'Load test smoke', ...SALE };
  const before = expect('a definition is read', get(api.getDefinition(sale.id)), ({ res, body }) =>
    res.status === 200 && body.version >= 1 && Boolean(res.headers.Etag) && body.hold_seconds === HOLD_SECONDS &&
    body.skus.length === 3 && body.lanes === 1);
  expect('the same definition changes nothing', get(api.putSale(sale.id, definition)), ({ res, body }) =>
    res.status === 200 && body.version === before.version);
  expect('a definition may change', get(api.putSale(sale.id, { ...definition, retention_days: 1 })),
    ({ res, body }) => res.status === 200 && body.version > before.version && body.retention_days === 1);
  refused('a definition with a limit that is none', api.putSale(sale.id, { ...definition, per_buyer_limit: 0 }),
    400, 'invalid-request', problemAt('/per_buyer_limit'));
  refused('a definition with an SKU twice',
    api.putSale(sale.id, { ...definition, skus: [SALE.skus[0], SALE.skus[0]] }), 400, 'invalid-request');
}

function callersAreTold(sale) {
  const order = api.placeOrder(sale, ask('nobody'));
  const named = ({ res }) => Boolean(res.headers['Www-Authenticate']);
  refused('no key', api.withHeaders(order, { Authorization: null }), 401, 'unauthenticated', named);
  refused('a key that is none', api.withHeaders(order, { Authorization: 'Bearer no-such-key' }), 401, 'unauthenticated', named);
  refused('a scheme that is none', api.withHeaders(order, { Authorization: 'Basic dTpw' }), 401, 'unauthenticated', named);
  refused('a shop does not define sales', api.asOrders(api.putSale(sale.id, SALE)), 403, 'forbidden');
  refused('a shop does not see the counters', api.asOrders(api.getStock(sale.id)), 403, 'forbidden');
  expect('an operator may do what a shop may', get(api.asOperator(api.listOrders(`sale_id=${sale.id}`))),
    ({ res }) => res.status === 200);
  refused('a path that is none', api.anyone('GET', '/v1/no-such-path'), 404, 'not-found');
  refused('a method that is none', api.anyone('PATCH', '/v1/orders'), 405, 'method-not-allowed',
    ({ res }) => res.headers.Allow.includes('POST'));
  const trace = '4bf92f3577b34da6a3ce929d0e0e4736';
  refused('a refusal carries the trace of its request',
    api.withHeaders(api.getOrder('ord_unknown'), { traceparent: `00-${trace}-00f067aa0ba902b7-01` }),
    404, 'order-not-found', ({ body }) => body.trace_id === trace);
}

function requestsAreRead(sale) {
  const order = ask('reader');
  const request = api.placeOrder(sale, order);
  const body = JSON.parse(request.body);
  const line = { sku: 'tea', quantity: 1 };
  const wrong = (what, changed, pointer) =>
    refused(what, withBody(request, changed), 400, 'invalid-request', pointer === undefined ? undefined : problemAt(pointer));

  refused('no idempotency key', api.withHeaders(request, { 'Idempotency-Key': null }), 400, 'idempotency-key-required');
  refused('an idempotency key too long', api.withHeaders(request, { 'Idempotency-Key': 'k'.repeat(256) }), 400, 'idempotency-key-invalid');
  refused('an idempotency key with a space', api.withHeaders(request, { 'Idempotency-Key': 'a b' }), 400, 'idempotency-key-invalid');
  refused('no content type', api.withHeaders(request, { 'Content-Type': null }), 415, 'unsupported-media-type');
  refused('another content type', api.withHeaders(request, { 'Content-Type': 'text/plain' }), 415, 'unsupported-media-type');
  refused('a body too large', withBody(request, { ...body, buyer_id: 'b'.repeat(17000) }), 413, 'body-too-large');
  wrong('a body that is no JSON', '{"sale_id": ');
  wrong('a body that is no object', '[]');
  wrong('a member that is unknown', { ...body, quantitiy: 2 });
  wrong('a member twice', request.body.replace('{', `{"buyer_id":"other",`));
  wrong('no buyer', { ...body, buyer_id: undefined });
  wrong('a buyer with a space', { ...body, buyer_id: 'a b' }, '/buyer_id');
  wrong('a buyer too long', { ...body, buyer_id: 'b'.repeat(129) }, '/buyer_id');
  wrong('no lines', { ...body, lines: [] }, '/lines');
  wrong('nine lines', { ...body, lines: Array.from({ length: 9 }, (_, n) => ({ sku: `s${n}`, quantity: 1 })) }, '/lines');
  wrong('an SKU twice', { ...body, lines: [line, line] });
  wrong('none of it', { ...body, lines: [{ sku: 'tea', quantity: 0 }] }, '/lines/0/quantity');
  wrong('more than a line may have', { ...body, lines: [{ sku: 'tea', quantity: 1001 }] }, '/lines/0/quantity');
  wrong('a quantity that is no integer', request.body.replace('"quantity":1', '"quantity":1.0'));
  wrong('a quantity that is text', { ...body, lines: [{ sku: 'tea', quantity: '1' }] });
  wrong('a hold longer than the sale has', { ...body, hold_seconds: HOLD_SECONDS + 1 }, '/hold_seconds');
  refused('an unknown SKU comes before its hold', withBody(request, { ...body, lines: one('no-such-sku'), hold_seconds: HOLD_SECONDS + 1 }),
    404, 'sku-not-found');
  refused('an unknown sale', withBody(request, { ...body, sale_id: 'no-such-sale' }), 404, 'sale-not-found');
  refused('an order id that was made up', api.getOrder('ord_made-up'), 404, 'order-not-found');
  refused('a payment for an order that was made up', api.confirmOrder('ord_made-up', 'p'), 404, 'order-not-found');
  refused('a cancel of an order that was made up', api.cancelOrder('ord_made-up'), 404, 'order-not-found');
  refused('a list of what no list is of', api.listOrders(`sale_id=${sale.id}&colour=red`), 400, 'invalid-request');
  refused('a list too long', api.listOrders(`sale_id=${sale.id}&limit=201`), 400, 'invalid-request');
}

/** Of several faults the first in the contract's order is told. */
function faultsAreToldInOrder(sale) {
  const request = api.placeOrder(sale, ask('muddler'));
  const huge = withBody(request, ' '.repeat(17000));
  const untyped = (one) => api.withHeaders(one, { 'Content-Type': null });
  refused('a key comes before all but the path', api.withHeaders(untyped(huge), { Authorization: null }), 401, 'unauthenticated');
  refused('scope comes before the body', api.asOrders(withBody(api.putSale(sale.id, SALE), '{')), 403, 'forbidden');
  refused('size comes before type', untyped(huge), 413, 'body-too-large');
  refused('type comes before JSON', untyped(withBody(request, '{')), 415, 'unsupported-media-type');
  refused('fields come before the sale', withBody(request, { sale_id: 'no-such-sale', buyer_id: '', lines: [] }), 400, 'invalid-request');
}

function anOrderIsHeld(sale) {
  const order = ask('alice', { lines: [{ sku: 'tea', quantity: 2 }, { sku: 'mug', quantity: 1 }] });
  const before = stock(sale);
  let answer = null;
  const held = place(sale, order, { told: (told) => { answer = told; } });
  expect('an order that is held', answer, ({ res, body }) =>
    res.status === 201 && isJson(answer) && res.headers.Location === `/v1/orders/${body.id}` &&
    body.id.startsWith('ord_') && body.sale_id === sale.id && body.buyer_id === 'alice' && body.status === 'held' &&
    body.payment_id === null && body.confirmed_at === null && isTime(body.created_at) && isTime(body.expires_at) &&
    Date.parse(body.expires_at) - Date.parse(body.created_at) === HOLD_SECONDS * 1000 &&
    body.returned.length === 0 && body.reacquired === false && body.durability === 'memory');
  expect('an order tells how far its limits are', answer, ({ res }) =>
    Boolean(res.headers['Ratelimit-Policy']) && Boolean(res.headers.Ratelimit));
  const after = stock(sale);
  expect('what is held is no longer available', answer, () =>
    after.tea.available === before.tea.available - 2 && after.tea.held === before.tea.held + 2 &&
    after.mug.held === before.mug.held + 1 && after.tea.sold === before.tea.sold);
  expect('an order is read as it stands', get(api.getOrder(held.id)), ({ res, body }) =>
    res.status === 200 && body.id === held.id && body.status === 'held' && sameLines(body.lines, order.lines) &&
    body.expires_at === held.expires_at);

  const again = ({ res, body, replayed }) => res.status === 201 && replayed && body.id === held.id;
  expect('a replay finds its order', get(api.placeOrder(sale, order)), again);
  expect('a replay may list its lines in another order', get(api.placeOrder(sale, { ...order, lines: [...order.lines].reverse() })), again);
  expect('quotes are not part of a key', get(api.placeOrder(sale, { ...order, key: `"${order.key}"` })), again);
  refused('a key that meant something else', api.placeOrder(sale, { ...order, lines: one('tea') }), 422, 'idempotency-key-reused');
  const others = place(sale, { ...order, buyer: 'alicia', lines: one('tea') });
  verify('a key is its buyer\'s own', others !== null && others.id !== held.id);
  return [held, others];
}

function anOrderIsPaid(sale) {
  const order = ask('bob');
  const held = place(sale, order);
  verify('what is held can be paid', confirm(held, 'payment-bob') === 'paid');
  expect('the same payment again changes nothing', get(api.confirmOrder(held.id, 'payment-bob')), ({ res, body }) =>
    res.status === 200 && body.status === 'confirmed' && isTime(body.confirmed_at));
  mustBeGivenBack('another payment', held, 'payment-other', 'already-paid');
  refused('a cancel of what is paid', api.cancelOrder(held.id), 409, 'order-confirmed', ({ body }) => body.order.status === 'confirmed');
  expect('the key of a paid order finds it', get(api.placeOrder(sale, order)), ({ res, body, replayed }) =>
    res.status === 200 && replayed && body.id === held.id && body.status === 'confirmed' && body.payment_id === 'payment-bob');
  refused('a payment without its id', withBody(api.confirmOrder(held.id, 'p'), {}), 400, 'invalid-request');
}

function aPaymentRuns(sale) {
  const held = place(sale, ask('kim'));
  const paying = begin(sale, held, 'payment-kim');
  verify('a payment that runs has its grace', Date.parse(paying.expires_at) - Date.parse(held.created_at) >= GRACE_SECONDS * 1000);
  expect('the same payment begun again changes nothing', get(api.beginPayment(held.id, 'payment-kim')), ({ res, body }) =>
    res.status === 200 && body.status === 'paying' && body.expires_at === paying.expires_at);
  verify('another takes its place', begin(sale, held, 'payment-kim-2') !== null);
  expect('what fails must be the payment that runs', get(api.deliver(api.payment('failed', held.id, 'payment-kim'))), ({ res }) => res.status === 204);
  verify('and it is', get(api.getOrder(held.id)).body.status === 'paying');
  verify('a payment fails', failByWebhook(held, 'payment-kim-2'));
  verify('and another buys', confirm(held, 'payment-kim-3') === 'paid');
  refused('what is paid begins no payment', api.beginPayment(held.id, 'payment-kim-4'), 409, 'order-confirmed', ({ body }) => body.order.id === held.id);
  refused('a payment begins with its id', withBody(api.beginPayment(held.id, 'p'), {}), 400, 'invalid-request');
  refused('no payment begins for an order that was made up', api.beginPayment('ord_made-up', 'p'), 404, 'order-not-found');
  const told = waitFor(10, () => {
    const { steps } = get(api.getHistory(held.id)).body;
    return Array.isArray(steps) && steps.map(({ event }) => event).join() === 'held,payment_begun,payment_begun,payment_failed,confirmed';
  });
  verify('its history is told', told);
}

function aPartIsPaid(sale) {
  const order = ask('liam', { lines: [{ sku: 'tea', quantity: 2 }, { sku: 'mug', quantity: 1 }] });
  const before = stock(sale);
  const held = place(sale, order);
  refused('more than is held is not bought', api.confirmOrder(held.id, 'payment-liam', [{ sku: 'tea', quantity: 3 }]), 400, 'invalid-request', problemAt('/lines'));
  refused('nor is nothing', api.confirmOrder(held.id, 'payment-liam', []), 400, 'invalid-request', problemAt('/lines'));
  verify('a part is bought', confirm(held, 'payment-liam', { lines: one('tea') }) === 'paid');
  const after = stock(sale);
  verify('the rest is on sale again', after.tea.available === before.tea.available - 1 && after.mug.available === before.mug.available);
  expect('its key finds it all the same', get(api.placeOrder(sale, order)), ({ res, body, replayed }) =>
    res.status === 200 && replayed && body.id === held.id && sameLines(body.lines, one('tea')));
}

function whatWasSoldComesBack(sale) {
  const order = ask('mia', { lines: [{ sku: 'tea', quantity: 2 }] });
  const held = place(sale, order);
  refused('what is not sold does not come back', api.returnOrder(held.id, { key: 'r-1', restock: true }), 409, 'order-not-confirmed');
  verify('it is sold', confirm(held, 'payment-mia') === 'paid');
  const before = stock(sale).tea;
  const first = { key: 'r-1', lines: one('tea'), restock: true };
  const kept = takeBack(held, first);
  verify('what comes back is on sale again', stock(sale).tea.available === before.available + 1);
  expect('a replay of a return is the same', get(api.returnOrder(held.id, first)), ({ res, body, replayed }) =>
    res.status === 200 && replayed && sameLines(body.returned, one('tea')));
  refused('its key with another return', api.returnOrder(held.id, { ...first, restock: false }), 422, 'idempotency-key-reused');
  refused('its key is required', api.withHeaders(api.returnOrder(held.id, first), { 'Idempotency-Key': null }), 400, 'idempotency-key-required');
  refused('no more comes back than is left', api.returnOrder(held.id, { key: 'r-2', lines: order.lines, restock: true }), 409, 'return-exceeds-order',
    ({ body }) => body.order.id === held.id);
  const gone = takeBack(kept, { key: 'r-3', restock: false });
  verify('what is broken leaves the total', gone.status === 'returned' && stock(sale).tea.total === before.total - 1);
  refused('a returned order is not cancelled', api.cancelOrder(held.id), 409, 'order-returned');
  expect('its own payment again changes nothing', get(api.confirmOrder(held.id, 'payment-mia')), ({ res, body }) =>
    res.status === 200 && body.status === 'returned');
  mustBeGivenBack('another payment of a returned order', held, 'payment-mia-2', 'already-paid');
}

function theProviderSaysIt(sale) {
  const held = place(sale, ask('noah'));
  const success = api.payment('succeeded', held.id, 'payment-noah');
  const signed = api.deliver(success);
  refused('nobody signed it', api.withHeaders(signed, { 'webhook-signature': null }), 401, 'invalid-signature');
  refused('it was changed since', withBody(signed, { ...success, type: 'payment.failed' }), 401, 'invalid-signature');
  refused('it is too old', api.deliver(success, { late_seconds: 301 }), 401, 'invalid-signature');
  refused('it is not of its time', api.deliver(success, { late_seconds: -310 }), 401, 'invalid-signature');
  refused('another signed it', api.deliver(success, { secret: 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw' }), 401, 'invalid-signature');
  verify('what nobody signed did nothing', get(api.getOrder(held.id)).body.status === 'held');
  refused('what cannot be read', api.deliver({ data: {} }), 400, 'invalid-request');
  const heard = (what, delivery) => expect(what, get(api.deliver(delivery)), ({ res }) => res.status === 204);
  heard('a type that is unknown is heard', { ...success, type: 'payment.thought-about' });
  heard('an order that was made up is heard', api.payment('succeeded', 'ord_made-up', 'payment-noah'));
  heard('members that are unknown are heard', { ...api.payment('failed', held.id, 'payment-other'), livemode: true });
  verify('the provider says that it is paid', confirmByWebhook(held, 'payment-noah') === 'paid');
  heard('and again', success);
  heard('and late, that it failed', api.payment('failed', held.id, 'payment-noah'));
  expect('it stays paid', get(api.getOrder(held.id)), ({ body }) => body.status === 'confirmed' && body.payment_id === 'payment-noah');
  const other = place(sale, ask('noah'));
  verify('lines that are no part of the order must be given back',
    confirmByWebhook(other, 'payment-noah-2', { lines: one('mug') }) === 'refund-due');
  verify('and the order is held as before', cancel(other));
}

function paymentsAreGivenBack(sale) {
  const list = (query) => get(api.listRefunds(`sale_id=${sale.id}${query}`));
  const due = { 'already-paid': 2, 'lines-mismatch': 1, 'order-cancelled': 1, 'payment-too-late': 1 };
  const count = Object.values(due).reduce((sum, n) => sum + n);
  verify('payments to give back are listed', waitFor(10, () => list('&status=due').body.refunds.length === count));
  const all = expect('each once, with its reason', list(''), ({ body }) =>
    body.refunds.every(({ id, status, settled_at, created_at }) => id.startsWith('rfd_') && status === 'due' && settled_at === null && isTime(created_at)) &&
    Object.entries(due).every(([reason, n]) => body.refunds.filter((refund) => refund.reason === reason).length === n)).refunds;
  expect('a page leads to the next', list('&limit=3'), ({ body }) =>
    body.refunds.length === 3 && list(`&limit=3&cursor=${encodeURIComponent(body.next_cursor)}`).body.refunds.length === count - 3);
  settleRefund(all[0].id);
  expect('settled again it is the same', get(api.settleRefund(all[0].id)), ({ res, body }) =>
    res.status === 200 && body.status === 'settled' && isTime(body.settled_at));
  expect('what is settled is due no more', list('&status=due'), ({ body }) =>
    body.refunds.length === count - 1 && body.refunds.every(({ id }) => id !== all[0].id));
  expect('and listed as settled', list('&status=settled'), ({ body }) => body.refunds.length === 1 && body.refunds[0].id === all[0].id);
  refused('a refund that is none', api.settleRefund('rfd_made-up'), 404, 'refund-not-found');
  refused('a list of what no list is of', api.listRefunds('colour=red'), 400, 'invalid-request');
}

function anOrderIsGivenBack(sale) {
  const order = ask('carol');
  const before = stock(sale);
  const held = place(sale, order);
  verify('what is held can be given back', cancel(held));
  const after = stock(sale);
  verify('what is given back is available', after.tea.available === before.tea.available && after.tea.held === before.tea.held);
  expect('cancelling again changes nothing', get(api.cancelOrder(held.id, { reason: 'twice' })), ({ res, body }) =>
    res.status === 200 && body.status === 'cancelled');
  mustBeGivenBack('a payment for what was given back', held, 'payment-carol', 'order-cancelled');
  refused('the key of what was given back', api.placeOrder(sale, order), 409, 'order-cancelled', ({ body }) => body.order.id === held.id);
  refused('a cancel with a member that is unknown', api.cancelOrder(held.id, { because: 'x' }), 400, 'invalid-request');
}

function anOrderIsCancelledByItsKey(sale) {
  const order = ask('dave');
  const held = place(sale, order);
  verify('an order is cancelled by its key', cancelWithKey(sale, order, held));
  const never = ask('dave');
  verify('an order that never came is cancelled by its key', layTombstone(sale, never) !== null);
  expect('again, it changes nothing', get(api.cancelByKey(sale, never)), ({ res, body }) =>
    res.status === 200 && body.status === 'cancelled' && body.lines.length === 0);
  verify('when it comes, it is refused', place(sale, never) === null);
  refused('a cancel by key in an unknown sale', api.cancelByKey({ id: 'no-such-sale' }, never), 404, 'sale-not-found');
}

function aHoldRunsOut(sale) {
  const order = ask('erin', { lines: one('last-one'), hold_seconds: 1 });
  const held = place(sale, order);
  refused('the last one is held', api.placeOrder(sale, ask('frank', { lines: one('last-one') })), 409, 'sold-out', ({ body }) =>
    body.lines.length === 1 && body.lines[0].sku === 'last-one' && body.lines[0].requested === 1 && body.lines[0].available === 0);
  expect('a short line refuses the whole order',
    get(api.placeOrder(sale, ask('frank', { lines: [...one('tea'), ...one('last-one')] }))),
    ({ code, body }) => code === 'sold-out' && body.lines.length === 1 && body.lines[0].sku === 'last-one');
  sleep(Math.max(0, Date.parse(held.expires_at) - Date.now()) / 1000);
  const expired = waitFor(5, () => get(api.getOrder(held.id)).body.status === 'expired');
  verify('a hold that is not paid runs out', expired);
  verify('and its unit is available again', waitFor(5, () => stock(sale)['last-one'].available === 1));
  refused('the key of what ran out', api.placeOrder(sale, order), 409, 'order-expired', ({ body }) => body.order.id === held.id);
  // Somebody else takes it, so that a late payment cannot have it back.
  const next = place(sale, ask('grace', { lines: one('last-one') }));
  verify('somebody else may have it', next !== null && confirm(next, 'payment-grace') === 'paid');
  mustBeGivenBack('a payment too late', held, 'payment-erin', 'payment-too-late');
  const back = takeBack(expect('the other is paid', get(api.getOrder(next.id)), ({ body }) => body.status === 'confirmed'), { key: 'r', restock: true });
  verify('what is due stays due, whatever comes back', back !== null && stock(sale)['last-one'].available === 1);
  refused('the payment too late, again', api.confirmOrder(held.id, 'payment-erin'), 409, 'payment-too-late');
  verify('another payment takes what came back', confirm(held, 'payment-erin-2') === 'reacquired');
}

function limitsHold(sale) {
  const buyer = 'heidi';
  const mugs = place(sale, ask(buyer, { lines: [{ sku: 'mug', quantity: 2 }] }));
  refused('an SKU has a limit of its own', api.placeOrder(sale, ask(buyer, { lines: one('mug') })), 409, 'purchase-limit', ({ body }) =>
    body.limit === 2 && body.already === 2 && body.sku === 'mug');
  const teas = place(sale, ask(buyer, { lines: [{ sku: 'tea', quantity: 2 }] }));
  refused('a sale has a limit over all SKUs', api.placeOrder(sale, ask(buyer)), 409, 'purchase-limit', ({ body }) =>
    body.limit === 4 && body.already === 4 && body.sku === undefined);
  return [mugs, teas];
}

function ordersAreListed(sale) {
  const list = (query) => get(api.listOrders(`sale_id=${sale.id}${query}`));
  const recorded = waitFor(10, () => list('&buyer_id=bob&status=confirmed').body.orders.length === 1);
  verify('what is paid is recorded, and listed', recorded);
  expect('a list is newest first', list('&limit=200'), ({ body }) => {
    const times = body.orders.map(({ created_at }) => created_at);
    return times.length > 3 && times.every((time, n) => n === 0 || time <= times[n - 1]);
  });
  const first = list('&limit=2').body;
  expect('a page leads to the next', list(`&limit=2&cursor=${encodeURIComponent(first.next_cursor)}`), ({ body }) =>
    body.orders.length === 2 && first.orders.every(({ id }) => body.orders.every((order) => order.id !== id)));
  expect('a list of one buyer shows no other', list('&buyer_id=alice'), ({ body }) =>
    body.orders.length >= 1 && body.orders.every(({ buyer_id }) => buyer_id === 'alice'));
}

function stockIsAdjusted(sale) {
  const change = { sku: 'tea', key: 'adjustment-1', delta: 5, reason: 'restock', reference: 'delivery-7', note: 'five more' };
  const before = stock(sale).tea;
  const adjustment = adjust(sale, change);
  const after = stock(sale).tea;
  verify('an adjustment changes the total', after.total === before.total + 5 && after.available === before.available + 5 && after.version === before.version + 1);
  expect('a replay of an adjustment is the same', get(api.adjustStock(sale, change)), ({ res, body, replayed }) =>
    res.status === 200 && replayed && body.id === adjustment.id && body.reason === 'restock' && body.reference === 'delivery-7' &&
    body.note === 'five more' && typeof body.actor === 'string' && isTime(body.created_at));
  refused('its key with another change', api.adjustStock(sale, { ...change, delta: 6 }), 422, 'idempotency-key-reused');
  refused('its key is required', api.withHeaders(api.adjustStock(sale, change), { 'Idempotency-Key': null }), 400, 'idempotency-key-required');
  verify('stock can be taken out', adjust(sale, { sku: 'mug', key: 'adjustment-2', delta: -3, reason: 'damaged' }) !== null);
  const mugs = stock(sale).mug;
  refused('what is held or sold is never taken', api.adjustStock(sale, { sku: 'mug', key: 'adjustment-3', delta: -(mugs.available + 1), reason: 'lost' }),
    409, 'stock-in-use', ({ body }) => JSON.stringify(body).includes(`"available":${mugs.available}`));
  const wrong = (what, more) =>
    refused(what, api.adjustStock(sale, { ...change, key: 'adjustment-4', ...more }), 400, 'invalid-request');
  wrong('a change of nothing', { delta: 0 });
  wrong('a reason that is none', { reason: 'because' });
  wrong('a total out of range', { delta: 1000000000 });
  refused('an SKU that is none', api.adjustStock(sale, { ...change, sku: 'no-such-sku', key: 'adjustment-5' }), 404, 'sku-not-found');
  refused('a shop does not adjust', api.asOrders(api.adjustStock(sale, change)), 403, 'forbidden');
  expect('adjustments are listed, newest first', get(api.listAdjustments(sale.id)), ({ res, body }) =>
    res.status === 200 && body.adjustments.length === 2 && body.adjustments[1].id === adjustment.id && 'next_cursor' in body);
  expect('adjustments of one SKU', get(api.listAdjustments(sale.id, '?sku=mug')), ({ body }) =>
    body.adjustments.length === 1 && body.adjustments[0].delta === -3);
  refused('stock is changed by adjustments only',
    api.putSale(sale.id, { name: 'Load test smoke', ...SALE, skus: [{ sku: 'tea', stock: 60 }, ...SALE.skus.slice(1)] }), 409, 'sale-in-use');
}

function stockIsCounted(sale) {
  const { total, version } = stock(sale).tea;
  const change = { sku: 'tea', key: 'count-1', set_total: total + 2, version, reason: 'recount' };
  expect('a dry run says what would come of it', get(api.setTotal(sale, { ...change, dry_run: true })), ({ res, body }) =>
    res.status === 200 && !('id' in body) && body.delta === 2 && body.after.total === total + 2 && body.after.version === version + 1);
  verify('and changes nothing', stock(sale).tea.version === version);
  refused('a total is set for one version', api.withHeaders(api.setTotal(sale, change), { 'If-Match': null }), 428, 'precondition-required');
  refused('and for no other', api.setTotal(sale, { ...change, version: version + 1 }), 412, 'precondition-failed',
    ({ body }) => body.version === version && body.total === total);
  const counted = setTotal(sale, change, 2);
  verify('a total is set', counted.after.total === total + 2 && stock(sale).tea.total === total + 2);
  expect('a replay comes before the version', get(api.setTotal(sale, change)), ({ res, body, replayed }) =>
    res.status === 200 && replayed && body.id === counted.id);
  verify('a count may find the total right', setTotal(sale, { ...change, key: 'count-2', version: version + 1 }, 0) !== null);
}

function anAdjustmentIsUndone(sale) {
  const before = stock(sale).mug.total;
  const loss = adjust(sale, { sku: 'mug', key: 'adjustment-6', delta: -1, reason: 'lost', reference: 'count-3' });
  const found = undo(loss, 'undo-1');
  verify('an undo is a correction with the reference of what it undoes',
    found.undoes === loss.id && found.reason === 'correction' && found.reference === 'count-3' && stock(sale).mug.total === before);
  expect('a replay of an undo is the same', get(api.undoAdjustment(loss.id, 'undo-1')), ({ res, body, replayed }) =>
    res.status === 200 && replayed && body.id === found.id);
  refused('its key with another note', api.undoAdjustment(loss.id, 'undo-1', 'found it'), 422, 'idempotency-key-reused');
  refused('nothing is undone twice', api.undoAdjustment(loss.id, 'undo-2'), 409, 'already-undone', ({ body }) => body.undone_by === found.id);
  verify('an undo can be undone', undo(found, 'undo-3') !== null && stock(sale).mug.total === before - 1);
  expect('the trail shows what undid what', get(api.listAdjustments(sale.id, '?sku=mug&limit=3')), ({ body }) =>
    body.adjustments[1].undoes === loss.id && body.adjustments[2].undone_by === found.id && body.adjustments[1].undone_by === body.adjustments[0].id);
  refused('an adjustment that is none', api.undoAdjustment('no-such-adjustment', 'undo-4'), 404, 'adjustment-not-found');
  refused('a shop does not undo', api.asOrders(api.undoAdjustment(loss.id, 'undo-5')), 403, 'forbidden');
}

function aSaleRests(sale) {
  const order = ask('ivan');
  const held = place(sale, order);
  expect('a sale is paused', get(api.steerSale(sale.id, 'pause')), ({ res, body }) => res.status === 200 && body.state === 'paused');
  refused('a paused sale sells nothing', api.placeOrder(sale, ask('ivan')), 409, 'sale-paused');
  expect('a replay finds its order all the same', get(api.placeOrder(sale, order)), ({ res, body, replayed }) =>
    res.status === 201 && replayed && body.id === held.id);
  verify('settling goes on in a paused sale', confirm(held, 'payment-ivan') === 'paid');
  expect('a sale is resumed', get(api.steerSale(sale.id, 'resume')), ({ res, body }) => res.status === 200 && body.state === 'open');
  const sold = place(sale, ask('ivan'));
  verify('a resumed sale sells again', sold !== null && cancel(sold));
  refused('a shop does not pause', api.asOrders(api.steerSale(sale.id, 'pause')), 403, 'forbidden');
}

/** A sale of its own: nothing can be ordered from it. */
function aSaleOpensLater() {
  const id = saleId('smoke-later');
  const opens_at = new Date(Date.now() + 3600000).toISOString();
  expect('a sale may open later', get(api.putSale(id, { name: 'Later', opens_at, skus: [{ sku: 'tea', stock: 1 }] })),
    ({ res }) => res.status === 201);
  expect('it is scheduled', get(api.anyone('GET', `/v1/sales/${id}`)), ({ body }) => body.state === 'scheduled' && body.opens_at === opens_at);
  refused('before it opens it sells nothing', api.placeOrder({ id }, ask('judy')), 409, 'sale-not-open', ({ body }) => body.opens_at === opens_at);
  refused('an end before its beginning',
    api.putSale(id, { name: 'Later', opens_at, closes_at: new Date().toISOString(), skus: [{ sku: 'tea', stock: 1 }] }), 400, 'invalid-request');
}

function aSaleCloses(sale, held) {
  expect('a sale is closed', get(api.steerSale(sale.id, 'close')), ({ res, body }) => res.status === 200 && body.state === 'closed');
  refused('a closed sale sells nothing', api.placeOrder(sale, ask('late')), 409, 'sale-closed');
  expect('what was ordered is still there', get(api.getOrder(held.id)), ({ body }) => body.status === 'held');
}
