//! What is recorded: relay, writer, sweeper and ledger against the real servers.

mod dead_letters;
mod follower;
mod ledger;
mod pipeline;
mod reconciler;
mod recovery;
#[path = "../support/shopper.rs"]
mod shopper;
mod support;
mod writer;
