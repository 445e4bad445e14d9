//! Holdfast: inventory deduction for flash sales. See `docs/architecture.md`.

pub mod admission;
pub mod app;
pub mod bus;
pub mod config;
pub mod domain;
mod failpoint;
pub mod http;
pub mod lanes;
pub mod ledger;
pub mod reconciler;
pub mod relay;
pub mod sweeper;
pub mod telemetry;
pub mod witness;
pub mod writer;
