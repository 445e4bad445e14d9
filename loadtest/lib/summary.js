// What a run asserts, and what it leaves for the books.
import { FAULTS, FINGERPRINTS, OUTCOMES, STEPS } from './steps.js';

const DIR = __ENV.HOLDFAST_LOAD_DIR;
const ORDER = 'POST /v1/orders';
// Codes to list one by one; whatever else comes is listed as `other`.
const CODES = [
  'sold-out', 'purchase-limit', 'sale-paused', 'sale-closed', 'sale-not-open', 'order-cancelled',
  'order-confirmed', 'order-returned', 'order-expired', 'payment-too-late', 'already-paid', 'stock-in-use', 'overloaded',
  'unavailable', 'lane-frozen', 'rate-limited', 'idempotency-key-reused',
];
const LOST = ['no-answer', 'outcome-unknown', 'internal'];
const MOVES = ['place', 'confirm', 'return', 'scrap', 'restock', 'write-off'];

// k6 keeps a tagged part of a metric only where a threshold names it: one that always holds.
const KEPT = { counter: ['count>=0'], trend: ['max>=0'] };

/**
 * The `options` of a scenario on these SKUs. Correctness decides, never time. `fates`, where buyers
 * have some: name → what may become of such a buyer → how often it must, as a threshold.
 */
export function loadOptions(skus, scenarios, fates = {}) {
  const thresholds = {
    checks: ['rate==1'],
    unexpected: ['count==0'],
    [`http_req_duration{name:${ORDER}}`]: KEPT.trend,
    [`http_reqs{name:${ORDER}}`]: KEPT.counter,
  };
  // Without faults nothing may be left unanswered; what a drill breaks is for the books to judge.
  if (!FAULTS) thresholds.lost = ['count==0'];
  for (const step of STEPS) {
    for (const outcome of OUTCOMES) thresholds[stepsOf(step, outcome)] = KEPT.counter;
  }
  for (const of of FINGERPRINTS) {
    for (const half of ['first', 'second']) thresholds[fingerprintOf(of, half)] = KEPT.counter;
  }
  for (const [fate, ends] of Object.entries(fates)) {
    for (const [end, wanted] of Object.entries(ends)) thresholds[fateOf(fate, end)] = [wanted];
  }
  for (const step of MOVES) for (const sku of skus) thresholds[unitsOf(step, sku)] = KEPT.counter;
  for (const code of CODES) thresholds[`refusals{code:${code}}`] = KEPT.counter;
  for (const code of LOST) thresholds[`lost{code:${code}}`] = KEPT.counter;
  return {
    scenarios,
    thresholds,
    summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max'],
    setupTimeout: '60s',
    teardownTimeout: '120s',
  };
}

const stepsOf = (step, outcome) => `steps{step:${step},outcome:${outcome}}`;
const unitsOf = (step, sku) => `units{step:${step},sku:${sku}}`;
const fingerprintOf = (of, half) => `fingerprints{of:${of},half:${half}}`;
const fateOf = (fate, end) => `fates{fate:${fate},end:${end}}`;
const FATE = /^fates\{fate:(.+),end:(.+)\}$/;

/** Every scenario exports this: `summary.json` for the books, and a few lines for a person. */
export function handleSummary(data) {
  const summary = summarise(data);
  const out = { stdout: tell(summary) };
  if (DIR) out[`${DIR}/summary.json`] = `${JSON.stringify(summary, null, 2)}\n`;
  return out;
}

function summarise({ metrics, setup_data, state, root_group }) {
  const count = (name) => (metrics[name] ? metrics[name].values.count : 0);
  const trend = (name) => (metrics[name] ? metrics[name].values : {});
  const byCode = (metric, codes) => {
    const known = codes.map((code) => [code, count(`${metric}{code:${code}}`)]);
    const other = count(metric) - known.reduce((sum, [, n]) => sum + n, 0);
    return Object.fromEntries([...known, ['other', other]].filter(([, n]) => n > 0));
  };
  const sale = (setup_data && setup_data.sale) || null;
  const checks = metrics.checks ? metrics.checks.values : { passes: 0, fails: 0 };
  return {
    scenario: sale && sale.scenario,
    sale,
    seconds: state.testRunDurationMs / 1000,
    steps: Object.fromEntries(
      STEPS.map((step) => {
        const [asked, done, refund, refused] = OUTCOMES.map((outcome) => count(stepsOf(step, outcome)));
        return [step, { asked, done, refund, refused, unknown: asked - done - refund - refused }];
      }),
    ),
    fates: fatesIn(metrics),
    units: Object.fromEntries(
      (sale ? sale.skus : []).map(({ sku }) => [
        sku,
        Object.fromEntries(MOVES.map((step) => [step.replace('-', '_'), count(unitsOf(step, sku))])),
      ]),
    ),
    fingerprints: Object.fromEntries(
      FINGERPRINTS.map((of) => [of, ['first', 'second'].map((half) => count(fingerprintOf(of, half)))]),
    ),
    refusals: byCode('refusals', CODES),
    lost: byCode('lost', LOST),
    unexpected: count('unexpected'),
    checks: { passed: checks.passes, failed: checks.fails, which: failedChecks(root_group) },
    dropped_iterations: count('dropped_iterations'),
    requests: { sent: count('http_reqs'), ms: trend('http_req_duration') },
    orders: { sent: count(`http_reqs{name:${ORDER}}`), ms: trend(`http_req_duration{name:${ORDER}}`) },
    thresholds_failed: Object.entries(metrics).flatMap(([name, { thresholds }]) =>
      Object.entries(thresholds || {}).filter(([, { ok }]) => !ok).map(([rule]) => `${name} ${rule}`),
    ),
  };
}

/** What became of buyers: fate → end → how many. */
function fatesIn(metrics) {
  const fates = {};
  for (const [name, { values }] of Object.entries(metrics)) {
    const [, fate, end] = FATE.exec(name) || [];
    if (fate === undefined || values.count === 0) continue;
    fates[fate] = { ...fates[fate], [end]: values.count };
  }
  return fates;
}

function failedChecks({ checks, groups }) {
  const own = checks.filter(({ fails }) => fails > 0).map(({ name, fails }) => `${fails} times not: ${name}`);
  return [...own, ...groups.flatMap(failedChecks)];
}

function tell(summary) {
  const { scenario, sale, seconds, steps, refusals, lost, checks, requests, orders, thresholds_failed } = summary;
  if (sale === null) return 'The sale could not be set up: nothing was pressed on.\n';
  const list = (counts) => Object.entries(counts).map(([code, n]) => `${n} ${code}`).join(', ') || 'none';
  const times = ({ sent, ms }) =>
    [`${sent} requests`, ...[['p50', 'med'], ['p95', 'p(95)'], ['p99', 'p(99)'], ['max', 'max']].map(
      ([name, key]) => `${name} ${ms[key] === undefined ? '-' : `${ms[key].toFixed(1)} ms`}`,
    )].join(', ');
  const lines = [
    `${scenario} on sale ${sale.id}: ${seconds.toFixed(1)} s` +
      (summary.dropped_iterations > 0 ? `, ${summary.dropped_iterations} iterations not started for want of VUs` : ''),
    `  all       ${times(requests)}`,
    `  orders    ${times(orders)}`,
    ...STEPS.filter((step) => steps[step].asked > 0).map((step) => {
      const { asked, done, refund, refused, unknown } = steps[step];
      const due = step === 'confirm' ? `, ${refund} refunds due` : '';
      return `  ${step.padEnd(9)} ${asked} asked: ${done} done${due}, ${refused} refused, ${unknown} unknown`;
    }),
    ...Object.entries(summary.fates).map(([fate, ends]) => `  ${fate.padEnd(26)} ${list(ends)}`),
    `  refusals  ${list(refusals)}`,
    `  lost      ${list(lost)} (asked again until it was told)`,
    `  checks    ${checks.passed} passed, ${checks.failed} failed; ${summary.unexpected} unexpected answers`,
    ...checks.which.map((what) => `            ${what}`),
    ...thresholds_failed.map((rule) => `  FAILED    ${rule}`),
  ];
  return `${lines.join('\n')}\n`;
}
