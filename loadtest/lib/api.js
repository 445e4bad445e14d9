// The calls of the HTTP order API: requests as plain objects, so that a scenario can send one
// twice, or several at once, and knows that they are the same.
import crypto from 'k6/crypto';
import encoding from 'k6/encoding';
import http from 'k6/http';

const URL = fromEnvironment('HOLDFAST_URL');
const INNER_URL = fromEnvironment('HOLDFAST_INNER_URL');
const ORDERS_KEY = fromEnvironment('HOLDFAST_ORDERS_KEY');
const OPERATOR_KEY = fromEnvironment('HOLDFAST_OPERATOR_KEY');
const WEBHOOK_SECRET = fromEnvironment('HOLDFAST_WEBHOOK_SECRET');

function fromEnvironment(name) {
  if (!__ENV[name]) throw new Error(`${name} is not set: run it with the environment of ./dev env`);
  return __ENV[name];
}

// Being refused is an answer, not a failure; only a server's error is one.
http.setResponseCallback(http.expectedStatuses({ min: 200, max: 499 }, 503));

// Longer than the service lets any call take: who gives up earlier learns nothing.
const TIMEOUT_MS = 15000;

// `name` keeps one series a route where the path holds an id.
function request(method, name, path, key, body, headers = {}) {
  const all = Object.assign({}, headers);
  if (key) all.Authorization = `Bearer ${key}`;
  if (body !== undefined) all['Content-Type'] = 'application/json';
  return {
    method,
    url: URL + path,
    body: body === undefined ? null : JSON.stringify(body),
    params: { headers: all, tags: { name: `${method} ${name}` }, timeout: TIMEOUT_MS },
  };
}

// ---- orders

export function placeOrder(sale, { buyer, key, lines, ...more }) {
  const body = { sale_id: sale.id, buyer_id: buyer, lines, ...more };
  return request('POST', '/v1/orders', '/v1/orders', ORDERS_KEY, body, { 'Idempotency-Key': key });
}

export function getOrder(id) {
  return request('GET', '/v1/orders/{id}', `/v1/orders/${id}`, ORDERS_KEY);
}

export function listOrders(query) {
  return request('GET', '/v1/orders', `/v1/orders?${query}`, ORDERS_KEY);
}

export function getHistory(id) {
  return request('GET', '/v1/orders/{id}/history', `/v1/orders/${id}/history`, ORDERS_KEY);
}

export function beginPayment(id, payment_id) {
  return request('POST', '/v1/orders/{id}/begin-payment', `/v1/orders/${id}/begin-payment`, ORDERS_KEY, { payment_id });
}

/** `lines`: what of it is bought; all, where there are none. */
export function confirmOrder(id, payment_id, lines) {
  return request('POST', '/v1/orders/{id}/confirm', `/v1/orders/${id}/confirm`, ORDERS_KEY, { payment_id, lines });
}

export function cancelOrder(id, body) {
  return request('POST', '/v1/orders/{id}/cancel', `/v1/orders/${id}/cancel`, ORDERS_KEY, body);
}

export function cancelByKey(sale, { buyer, key }) {
  const body = { sale_id: sale.id, buyer_id: buyer, idempotency_key: key };
  return request('POST', '/v1/orders/cancel', '/v1/orders/cancel', ORDERS_KEY, body);
}

/** `lines`: what of it comes back; all that is left, where there are none. */
export function returnOrder(id, { key, lines, restock }) {
  const headers = { 'Idempotency-Key': key };
  return request('POST', '/v1/orders/{id}/return', `/v1/orders/${id}/return`, ORDERS_KEY, { lines, restock }, headers);
}

// ---- payments

/** `type`: succeeded or failed. */
export function payment(type, order_id, payment_id, lines) {
  return { type: `payment.${type}`, timestamp: new Date().toISOString(), data: { order_id, payment_id, lines } };
}

/** What the payment provider says, signed by Standard Webhooks, now or `late_seconds` ago. */
export function deliver(delivery, { late_seconds = 0, secret = WEBHOOK_SECRET } = {}) {
  const { order_id, payment_id } = delivery.data;
  const id = `msg_${crypto.md5(`${delivery.type} ${order_id} ${payment_id}`, 'hex')}`;
  const at = Math.floor(Date.now() / 1000) - late_seconds;
  const one = anyone('POST', '/v1/payments/webhook', delivery);
  const key = encoding.b64decode(secret.replace('whsec_', ''));
  const signature = crypto.hmac('sha256', key, `${id}.${at}.${one.body}`, 'base64');
  return withHeaders(one, { 'webhook-id': id, 'webhook-timestamp': String(at), 'webhook-signature': `v1,${signature}` });
}

export function listRefunds(query) {
  return request('GET', '/v1/refunds', `/v1/refunds?${query}`, ORDERS_KEY);
}

export function settleRefund(id) {
  return request('POST', '/v1/refunds/{id}/settle', `/v1/refunds/${id}/settle`, ORDERS_KEY);
}

// ---- sales and stock

export function putSale(id, definition) {
  return request('PUT', '/v1/sales/{id}', `/v1/sales/${id}`, OPERATOR_KEY, definition);
}

export function getDefinition(id) {
  return request('GET', '/v1/sales/{id}/definition', `/v1/sales/${id}/definition`, OPERATOR_KEY);
}

/** `verb`: pause, resume or close. */
export function steerSale(id, verb) {
  return request('POST', `/v1/sales/{id}/${verb}`, `/v1/sales/${id}/${verb}`, OPERATOR_KEY);
}

export function getStock(id) {
  return request('GET', '/v1/sales/{id}/stock', `/v1/sales/${id}/stock`, OPERATOR_KEY);
}

export function adjustStock(sale, { sku, key, ...change }) {
  const path = `/v1/sales/${sale.id}/stock/${sku}/adjustments`;
  const headers = { 'Idempotency-Key': key };
  return request('POST', '/v1/sales/{id}/stock/{sku}/adjustments', path, OPERATOR_KEY, change, headers);
}

/** `version`: of the SKU, for `If-Match`. */
export function setTotal(sale, { version, ...change }) {
  return withHeaders(adjustStock(sale, change), { 'If-Match': `"${version}"` });
}

export function undoAdjustment(id, key, note) {
  const body = note === undefined ? undefined : { note };
  return request('POST', '/v1/adjustments/{id}/undo', `/v1/adjustments/${id}/undo`, OPERATOR_KEY, body, { 'Idempotency-Key': key });
}

export function listAdjustments(id, query = '') {
  return request('GET', '/v1/sales/{id}/adjustments', `/v1/sales/${id}/adjustments${query}`, OPERATOR_KEY);
}

/** Without a key: what is open to all, and what a caller gets who has none. */
export function anyone(method, path, body) {
  return request(method, path.split('?')[0], path, undefined, body);
}

/** What only the inside sees: its own listener. */
export function inside(path) {
  const one = anyone('GET', path);
  return { ...one, url: INNER_URL + path };
}

// ---- sending

/** One request, once. `timeout_ms` is for a caller that does not wait for its answer. */
export function send(one, timeout_ms) {
  const params = timeout_ms ? { ...one.params, timeout: timeout_ms } : one.params;
  return http.request(one.method, one.url, one.body, params);
}

/** All at once, on connections of their own. */
export function sendTogether(requests) {
  return http.batch(requests.map(({ method, url, body, params }) => ({ method, url, body, params })));
}

/** The same request with other headers; null takes one away. */
export function withHeaders(one, headers) {
  const all = Object.assign({}, one.params.headers, headers);
  for (const name of Object.keys(all)) if (all[name] === null) delete all[name];
  return { ...one, params: { ...one.params, headers: all } };
}

export const asOperator = (one) => withHeaders(one, { Authorization: `Bearer ${OPERATOR_KEY}` });
export const asOrders = (one) => withHeaders(one, { Authorization: `Bearer ${ORDERS_KEY}` });

// ---- reading

// Refusals that say: nothing was done, come again.
const TURNED_AWAY = ['overloaded', 'unavailable', 'lane-frozen', 'rate-limited', 'request-timeout'];

/**
 * What a response says, for the books:
 * `done` (2xx), `refused` (nothing was done, `code` says why), `away` (nothing was done, for want
 * of a part or of room) or `unknown` (no answer, or one that leaves open whether it happened).
 */
export function read(res) {
  const body = parse(res);
  if (res.status >= 200 && res.status < 300) {
    return { kind: 'done', res, body, replayed: res.headers['Idempotent-Replayed'] === 'true' };
  }
  if (res.status === 0) return { kind: 'unknown', res, body, code: 'no-answer' };
  const code = (body && body.code) || `http-${res.status}`;
  if (TURNED_AWAY.includes(code)) return { kind: 'away', res, body, code };
  return { kind: res.status >= 500 ? 'unknown' : 'refused', res, body, code };
}

function parse(res) {
  if (!res.body) return null;
  try {
    return JSON.parse(res.body);
  } catch (_) {
    return null; // the caller sees from the missing code that this was no JSON
  }
}
