//! What HTTP alone costs: a plain axum handler that reads the body of an order and answers one of
//! the same size as Holdfast's, without layers, limits or anybody to ask.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct PlaceOrder {
    sale_id: String,
    buyer_id: String,
    lines: Vec<Line>,
}

#[derive(Deserialize, Serialize)]
struct Line {
    sku: String,
    quantity: u32,
}

#[derive(Serialize)]
struct Order {
    id: &'static str,
    sale_id: String,
    buyer_id: String,
    status: &'static str,
    lines: Vec<Line>,
    returned: [Line; 0],
    payment_id: Option<String>,
    created_at: &'static str,
    expires_at: &'static str,
    confirmed_at: Option<String>,
    reacquired: bool,
    durability: &'static str,
    /// Whatever is missing to the size of the real answer.
    #[serde(skip_serializing_if = "str::is_empty")]
    filler: &'static str,
}

async fn place(State(filler): State<&'static str>, Json(asked): Json<PlaceOrder>) -> Response {
    let order = Order {
        id: "ord_AQAxJ8u3FrJ7OlhsS1pTtpEsLXVzPKxvn2yklg",
        sale_id: asked.sale_id,
        buyer_id: asked.buyer_id,
        status: "held",
        lines: asked.lines,
        returned: [],
        payment_id: None,
        created_at: "2026-11-11T00:00:00.000Z",
        expires_at: "2026-11-11T00:05:00.000Z",
        confirmed_at: None,
        reacquired: false,
        durability: "memory",
        filler,
    };
    (StatusCode::CREATED, Json(order)).into_response()
}

/// Serves until killed; `filler` bytes are added to each answer.
pub async fn serve(address: SocketAddr, filler: usize) -> anyhow::Result<()> {
    let filler: &'static str = "x".repeat(filler).leak();
    let router = Router::new().route("/v1/orders", post(place)).with_state(filler);
    let listener = tokio::net::TcpListener::bind(address).await?.tap_io(|stream| {
        // As Holdfast does; nothing is lost where it cannot be.
        stream.set_nodelay(true).ok();
    });
    Ok(axum::serve(listener, router).await?)
}
