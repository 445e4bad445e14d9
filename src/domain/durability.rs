//! How far a change has got.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How far what an answer says has got, each level stronger than those before it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Redis has it.
    Memory,
    /// Every replica of Redis that could be promoted has it.
    Replicated,
    /// Kafka has it.
    Logged,
    /// The database has it.
    Recorded,
}

impl Durability {
    pub const ALL: [Durability; 4] =
        [Durability::Memory, Durability::Replicated, Durability::Logged, Durability::Recorded];

    pub const fn as_str(self) -> &'static str {
        match self {
            Durability::Memory => "memory",
            Durability::Replicated => "replicated",
            Durability::Logged => "logged",
            Durability::Recorded => "recorded",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.as_str() == word)
    }

    /// What a deployment with so many replicas serves for this level: one that it does not have is
    /// served by the next stronger.
    pub fn served(self, replicas: u32) -> Self {
        if self == Durability::Replicated && replicas == 0 { Durability::Logged } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_a_deployment_does_not_have_is_served_by_the_next_stronger() {
        assert_eq!(Durability::Replicated.served(0), Durability::Logged);
        assert_eq!(Durability::Replicated.served(1), Durability::Replicated);
        for level in [Durability::Memory, Durability::Logged, Durability::Recorded] {
            assert_eq!((level.served(0), level.served(2)), (level, level));
        }
    }

    #[test]
    fn each_level_is_stronger_than_those_before_it_and_has_its_name() {
        assert!(Durability::ALL.is_sorted());
        for level in Durability::ALL {
            assert_eq!(Durability::from_word(level.as_str()), Some(level));
            assert_eq!(serde_json::to_value(level).unwrap(), level.as_str());
        }
        assert_eq!(Durability::from_word("Logged"), None);
    }
}
