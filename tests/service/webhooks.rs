//! The payment provider's webhook, as a library that we did not write signs it: PyPI's
//! `standardwebhooks`, in `webhooks.py`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Deployment, Servers, Service};

// With a character that only plain base64 has, and one of the longest that may be.
const OLD: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const NEW: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw==";
const NOBODYS: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// What the provider sends.
struct Delivery<'a> {
    secrets: &'a [&'a str],
    age_seconds: i64,
    body: String,
    /// What arrives, where somebody changes it on the way.
    changed: Option<String>,
}

impl<'a> Delivery<'a> {
    fn new(secrets: &'a [&'a str], kind: &str, order: &str, payment: &str) -> Self {
        let data = json!({"order_id": order, "payment_id": payment, "shop": "Käse & Öl ✓"});
        let body = json!({"type": kind, "timestamp": "2026-11-11T00:00:00Z", "data": data});
        let body = serde_json::to_string_pretty(&body).expect("plain data");
        Self { secrets, age_seconds: 0, body, changed: None }
    }

    /// Posts it and answers the status.
    fn send(&self, service: &Service<'_>) -> u16 {
        let input = json!({
            "url": format!("{}/v1/payments/webhook", service.url), "id": "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W",
            "secrets": self.secrets, "age_seconds": self.age_seconds,
            "signed": self.body, "sent": self.changed.as_ref().unwrap_or(&self.body),
        });
        let mut provider = Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/service/webhooks.py"))
            .env("PYTHONPATH", library())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let mut stdin = provider.stdin.take().expect("a pipe");
        stdin.write_all(input.to_string().as_bytes()).expect("it reads");
        drop(stdin);
        let output = provider.wait_with_output().expect("it ends");
        assert!(output.status.success(), "the provider failed");
        let said = String::from_utf8(output.stdout).expect("text");
        said.trim().parse().expect("a status")
    }
}

/// Where the library was put.
fn library() -> String {
    std::env::var("STANDARDWEBHOOKS").unwrap_or_else(|_| {
        panic!(
            "STANDARDWEBHOOKS is not set: run ./dev test, or ./dev install and set it to the \
             directory standardwebhooks-… among its tools"
        )
    })
}

fn secrets(secrets: &[&str]) -> String {
    json!(secrets).to_string()
}

async fn provided(with: &[&str]) -> Deployment {
    let secrets = secrets(with);
    let settings = [("HOLDFAST_PAYMENTS__WEBHOOK_SECRETS", secrets.as_str())];
    Deployment::with(Servers::shared(), &settings).await
}

async fn shown(service: &Service<'_>, order: &str) -> (Value, Value) {
    let body = service.get(&format!("/v1/orders/{order}")).await.body;
    (body["status"].clone(), body["payment_id"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_with_a_library_of_its_own_settles_orders() {
    let deployment = provided(&[NEW]).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({})).await;
    let order = service.order(&sale, "u-1", "k-1", 1).await;
    let id = order.id();
    let begin = format!("/v1/orders/{id}/begin-payment");
    service.post(&begin, json!({"payment_id": "pay-1"})).await;
    assert_eq!(shown(&service, id).await, (json!("paying"), json!("pay-1")));

    let failed = Delivery::new(&[NEW], "payment.failed", id, "pay-1");
    assert_eq!(failed.send(&service), 204);
    assert_eq!(shown(&service, id).await, (json!("held"), Value::Null));

    let succeeded = Delivery::new(&[NEW], "payment.succeeded", id, "pay-2");
    assert_eq!(succeeded.send(&service), 204);
    // Again, again after minutes, and what was overtaken.
    assert_eq!(succeeded.send(&service), 204);
    assert_eq!(Delivery { age_seconds: 240, ..succeeded }.send(&service), 204);
    assert_eq!(failed.send(&service), 204);
    assert_eq!(shown(&service, id).await, (json!("confirmed"), json!("pay-2")));
    assert_eq!(service.stock(&sale).await, [10, 9, 0, 1]);

    let second = Delivery::new(&[NEW], "payment.succeeded", id, "pay-3");
    for _ in 0..2 {
        assert_eq!(second.send(&service), 204);
    }
    assert_eq!(service.balanced_books(&sale).await.len(), 1);
    let refunds = service.get(&format!("/v1/refunds?sale_id={sale}")).await.body;
    let refunds = refunds["refunds"].as_array().expect("a list");
    assert_eq!(refunds.len(), 1, "{refunds:?}");
    assert_eq!(refunds[0]["payment_id"], "pay-3");
    let steps = service.get(&format!("/v1/orders/{id}/history")).await.body["steps"].clone();
    let steps: Vec<_> = steps.as_array().expect("steps").iter().map(|s| &s["event"]).collect();
    assert_eq!(steps, ["held", "payment_begun", "payment_failed", "confirmed", "refund_due"]);
}

/// One step of a rotation: what the service knows, and whose deliveries it then takes and refuses.
struct Stage {
    known: &'static [&'static str],
    taken: &'static [&'static [&'static str]],
    refused: &'static [&'static [&'static str]],
}

const ROTATION: [Stage; 3] = [
    Stage { known: &[OLD], taken: &[&[OLD], &[OLD, NEW]], refused: &[&[NEW]] },
    Stage {
        known: &[NEW, OLD],
        taken: &[&[OLD], &[NEW], &[OLD, NEW], &[NOBODYS, OLD]],
        refused: &[&[NOBODYS]],
    },
    Stage { known: &[NEW], taken: &[&[NEW], &[OLD, NEW]], refused: &[&[OLD], &[OLD, NOBODYS]] },
];

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_rotated_without_losing_a_delivery() {
    let mut deployment = provided(&[OLD]).await;
    for stage in ROTATION {
        deployment.set("HOLDFAST_PAYMENTS__WEBHOOK_SECRETS", &secrets(stage.known));
        let service = deployment.serve().await;
        let sale = service.define(10, json!({})).await;
        let deliver = async |signers: &[&str]| {
            let buyer = format!("u-{:08x}", rand::random::<u32>());
            let order = service.order(&sale, &buyer, "k", 1).await;
            let delivery = Delivery::new(signers, "payment.succeeded", order.id(), "pay");
            (delivery.send(&service), shown(&service, order.id()).await.0)
        };
        for signers in stage.taken {
            let became = deliver(signers).await;
            assert_eq!(became, (204, json!("confirmed")), "{:?} and {signers:?}", stage.known);
        }
        for signers in stage.refused {
            let became = deliver(signers).await;
            assert_eq!(became, (401, json!("held")), "{:?} and {signers:?}", stage.known);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_that_is_stale_forged_or_changed_does_nothing() {
    let deployment = provided(&[OLD, NEW]).await;
    let service = deployment.serve().await;
    let sale = service.define(10, json!({})).await;
    let order = service.order(&sale, "u-1", "k-1", 1).await;
    let made = |secrets| Delivery::new(secrets, "payment.succeeded", order.id(), "pay-1");
    let good = made(&[NEW]);

    // 300 s are allowed, and the clock runs on meanwhile.
    for age_seconds in [301, 86_400, -360] {
        let stale = Delivery { age_seconds, ..made(&[NEW]) };
        assert_eq!(stale.send(&service), 401, "{age_seconds} s old");
    }
    assert_eq!(made(&[NOBODYS]).send(&service), 401, "forged");
    assert_eq!(made(&[]).send(&service), 401, "not signed");
    for changed in [good.body.replace("pay-1", "pay-2"), format!("{} ", good.body)] {
        let delivery = Delivery { changed: Some(changed), ..made(&[OLD, NEW]) };
        assert_eq!(delivery.send(&service), 401, "changed on the way");
    }
    assert_eq!(shown(&service, order.id()).await, (json!("held"), Value::Null));
    assert_eq!(good.send(&service), 204, "the same, untouched");
    assert_eq!(shown(&service, order.id()).await, (json!("confirmed"), json!("pay-1")));
}
