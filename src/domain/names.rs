//! Names that callers choose. Each type accepts exactly what the contract allows, so whoever
//! holds one need not check it again.

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a text is not a valid name. Its message is shown to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("must be 1 to {max} characters long")]
    Length { max: usize },
    #[error("must consist of visible ASCII characters (0x21-0x7E)")]
    NotVisibleAscii,
    #[error("must consist of the characters A-Z a-z 0-9 . _ -")]
    NotToken,
}

fn visible_ascii(text: &str, max: usize) -> Result<(), NameError> {
    if text.is_empty() || text.len() > max {
        return Err(NameError::Length { max });
    }
    if !text.bytes().all(|b| (0x21..=0x7E).contains(&b)) {
        return Err(NameError::NotVisibleAscii);
    }
    Ok(())
}

fn token(text: &str, max: usize) -> Result<(), NameError> {
    if text.is_empty() || text.len() > max {
        return Err(NameError::Length { max });
    }
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Err(NameError::NotToken);
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $check:ident, $max:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                $check(&text, $max)?;
                Ok(Self(text.into()))
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                $check(text, $max)?;
                Ok(Self(text.into()))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A sale: 1-64 of `A-Za-z0-9._-`.
    SaleId, token, 64
);
name!(
    /// A stock keeping unit within a sale: 1-64 of `A-Za-z0-9._-`.
    Sku, token, 64
);
name!(
    /// A buyer, as the shop names them: 1-128 visible ASCII characters.
    BuyerId, visible_ascii, 128
);
name!(
    /// A payment, as the provider names it: 1-255 visible ASCII characters.
    PaymentId, visible_ascii, 255
);
name!(
    /// A caller's idempotency key: 1-255 visible ASCII characters.
    IdempotencyKey, visible_ascii, 255
);
name!(
    /// The name of an API key, which audit rows show as `actor`: 1-64 of `A-Za-z0-9._-`.
    KeyName, token, 64
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_takes_its_longest_text_and_no_longer() {
        assert!("s".repeat(64).parse::<SaleId>().is_ok());
        assert_eq!("s".repeat(65).parse::<SaleId>(), Err(NameError::Length { max: 64 }));
        assert!("k".repeat(255).parse::<IdempotencyKey>().is_ok());
        assert_eq!("".parse::<BuyerId>(), Err(NameError::Length { max: 128 }));
    }

    #[test]
    fn a_buyer_may_be_any_visible_ascii_but_no_space() {
        assert!("~!user@shop".parse::<BuyerId>().is_ok());
        assert_eq!("a b".parse::<BuyerId>(), Err(NameError::NotVisibleAscii));
        assert_eq!("jürgen".parse::<BuyerId>(), Err(NameError::NotVisibleAscii));
    }

    #[test]
    fn a_sale_id_cannot_break_out_of_its_redis_hash_tag() {
        for text in ["a}b", "a/b", "a b", "{a"] {
            assert_eq!(text.parse::<SaleId>(), Err(NameError::NotToken));
        }
    }
}
