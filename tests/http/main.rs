//! The HTTP API against the real Redis and PostgreSQL (`REDIS_URL`, `DATABASE_URL`): a test a
//! promise of the contract. What needs Kafka too is tested with the whole service.

mod adjustments;
mod archive;
mod checks;
mod conservation;
mod dead_letters;
mod durability;
mod frozen;
mod health;
mod history;
mod life;
mod limits;
mod listener;
mod orders;
mod payments;
#[path = "../support/redis_server.rs"]
mod redis_server;
mod replicas;
mod sales;
#[path = "../support/shopper.rs"]
mod shopper;
mod stack;
