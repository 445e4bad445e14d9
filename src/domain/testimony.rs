//! What a process has seen of a lane, for whoever recovers it.

use super::ids::EntityKey;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Testimony {
    /// The highest that it has seen; epoch 0: nothing.
    pub epoch: u32,
    pub seq: u64,
    /// The highest mark of Kafka that it has seen of that epoch.
    pub logged: u64,
    /// Orders above `logged` that it has told somebody of, each by the seq that it then had.
    pub orders: Vec<(u64, EntityKey)>,
    /// It told of more than it may keep: up to this seq some are not in `orders`; 0: all are.
    pub unlisted: u64,
}
