//! What Holdfast is about: names, orders, sales, stock and events. Pure: no I/O, no clock.

pub mod durability;
pub mod event;
pub mod history;
pub mod ids;
pub mod life;
pub mod names;
pub mod order;
pub mod sale;
pub mod stock;
pub mod testimony;
pub mod time;
