//! What the process tells of itself: logs and health. Each part registers its own metrics.

pub mod health;
pub mod log;
