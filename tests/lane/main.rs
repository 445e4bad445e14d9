//! The heart of the service, proven on a real Redis: the scripts in `lua/` through `Lanes`.

mod crowds;
mod failures;
mod frozen;
mod model;
mod orders;
mod outbox;
mod races;
mod random;
mod raw;
#[path = "../support/redis_server.rs"]
mod redis_server;
mod sale;
mod sales;
mod workload;
