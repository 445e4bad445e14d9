//! Order and adjustment ids.
//!
//! ```text
//! ord_ VVVVVVVVVVVVVVVV HHHHHHHHHHHHHHHHHHHHHH . double-11
//!      |                |                        sale
//!      |                 key: 16 bytes, keyed hash of (sale, buyer, idempotency key)
//!       12 bytes: secret version (1), lane (1), tag (10)
//! ```
//!
//! All of it base64url without padding. The *key* makes a replay one look-up: whoever knows the
//! sale's secret finds the order from its caller's idempotency key. The *tag* is a keyed hash of
//! everything else in the id, so a made-up id is told from a genuine one without asking anybody.
//! The key is also the order's field name in Redis, so an operator can cut it out of an id.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize, Serializer};

use super::names::{BuyerId, IdempotencyKey, NameError, PaymentId, SaleId};

/// Most lanes that a sale may have.
pub const LANES_MAX: u8 = 64;

/// One lane of one sale: a sequence of events of its own. `lane` counts from 0.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LaneId {
    pub sale: SaleId,
    pub lane: u8,
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.sale, self.lane)
    }
}

const KEY_BYTES: usize = 16;
const KEY_CHARS: usize = 22;
const TAG_BYTES: usize = 10;
const HEAD_BYTES: usize = 2 + TAG_BYTES;
const HEAD_CHARS: usize = 16;

/// The 128-bit keyed hash that names an order or an adjustment within its sale.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct EntityKey([u8; KEY_BYTES]);

impl EntityKey {
    /// The 22 characters that stand in ids and are field names in Redis.
    pub fn encode(&self) -> String {
        base64url(&self.0, &mut [0; KEY_CHARS]).to_owned()
    }

    /// Reads what [`EntityKey::encode`] wrote; `None` if it is anything else.
    pub fn decode(text: &str) -> Option<Self> {
        let mut bytes = [0; KEY_BYTES];
        let length = URL_SAFE_NO_PAD.decode_slice(text, &mut bytes).ok()?;
        (length == KEY_BYTES && text.len() == KEY_CHARS).then_some(Self(bytes))
    }
}

impl Serialize for EntityKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.encode())
    }
}

impl TryFrom<String> for EntityKey {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        Self::decode(&text).ok_or(IdError)
    }
}

impl fmt::Debug for EntityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.encode())
    }
}

/// What an id stands for. Part of the keyed hashes, so an adjustment's id never passes as an order's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Order,
    Adjustment,
    Refund,
    Return,
}

impl Kind {
    const fn prefix(self) -> &'static str {
        match self {
            Kind::Order => "ord_",
            Kind::Adjustment => "adj_",
            Kind::Refund => "rfd_",
            Kind::Return => "ret_",
        }
    }
}

/// One version of the secret behind ids: 32 random bytes, kept in the database.
#[derive(Clone)]
pub struct IdSecret {
    version: u8,
    key_hash: [u8; 32],
    tag_hash: [u8; 32],
}

impl IdSecret {
    /// Derives the two hashing keys from the stored secret (BLAKE3 `derive_key`).
    pub fn new(version: u8, secret: &[u8; 32]) -> Self {
        Self {
            version,
            key_hash: blake3::derive_key("holdfast v1 entity key", secret),
            tag_hash: blake3::derive_key("holdfast v1 id tag", secret),
        }
    }

    pub fn version(&self) -> u8 {
        self.version
    }

    /// The key of the order that this buyer places with this idempotency key.
    pub fn order_key(&self, sale: &SaleId, buyer: &BuyerId, key: &IdempotencyKey) -> EntityKey {
        self.key(Kind::Order, &[sale.as_str(), buyer.as_str(), key.as_str()])
    }

    /// The key of the adjustment that is asked for with this idempotency key.
    pub fn adjustment_key(&self, sale: &SaleId, key: &IdempotencyKey) -> EntityKey {
        self.key(Kind::Adjustment, &[sale.as_str(), key.as_str()])
    }

    /// The key of the refund of this payment for this order: one each.
    pub fn refund_key(&self, order: &OrderId, payment: &PaymentId) -> EntityKey {
        self.key(Kind::Refund, &[&order.key().encode(), payment.as_ref()])
    }

    /// The key of the return that is asked for, for this order, with this idempotency key.
    pub fn return_key(&self, order: &OrderId, key: &IdempotencyKey) -> EntityKey {
        self.key(Kind::Return, &[&order.key().encode(), key.as_str()])
    }

    /// The lane, of `lanes`, in which this buyer's orders always fall.
    pub fn lane_of(&self, sale: &SaleId, buyer: &BuyerId, lanes: u8) -> u8 {
        if lanes <= 1 {
            return 0;
        }
        let hash = hash(&self.key_hash, &["lane", sale.as_str(), buyer.as_str()]);
        let number = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("8 of 32 bytes"));
        (number % u64::from(lanes)) as u8
    }

    pub fn order_id(&self, lane: &LaneId, key: EntityKey) -> OrderId {
        OrderId(self.id(Kind::Order, lane, key))
    }

    pub fn refund_id(&self, order: &OrderId, payment: &PaymentId) -> RefundId {
        RefundId(self.id(Kind::Refund, order.lane(), self.refund_key(order, payment)))
    }

    pub fn adjustment_id(&self, lane: &LaneId, key: EntityKey) -> AdjustmentId {
        AdjustmentId(self.id(Kind::Adjustment, lane, key))
    }

    fn key(&self, kind: Kind, parts: &[&str]) -> EntityKey {
        let mut all = Vec::with_capacity(4);
        all.push(kind.prefix());
        all.extend_from_slice(parts);
        let hash = hash(&self.key_hash, &all);
        EntityKey(hash.as_bytes()[..KEY_BYTES].try_into().expect("16 of 32 bytes"))
    }

    fn tag(&self, kind: Kind, lane: &LaneId, key: EntityKey) -> blake3::Hash {
        let head = [self.version, lane.lane];
        let parts = [kind.prefix().as_bytes(), &head, &key.0, lane.sale.as_str().as_bytes()];
        blake3::keyed_hash(&self.tag_hash, &parts.concat())
    }

    fn id(&self, kind: Kind, lane: &LaneId, key: EntityKey) -> Id {
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&self.tag(kind, lane, key).as_bytes()[..TAG_BYTES]);
        Id { version: self.version, lane: lane.clone(), key, tag }
    }

    fn signed(&self, kind: Kind, id: &Id) -> bool {
        // Comparing through blake3::Hash is constant-time, so a tag cannot be guessed byte by byte.
        let mut claimed = *self.tag(kind, &id.lane, id.key).as_bytes();
        let expected = blake3::Hash::from_bytes(claimed);
        claimed[..TAG_BYTES].copy_from_slice(&id.tag);
        self.version == id.version && expected == blake3::Hash::from_bytes(claimed)
    }
}

impl fmt::Debug for IdSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IdSecret(version {})", self.version)
    }
}

/// Hashes parts so that no two lists of parts have the same input: each is preceded by its length.
fn hash(key: &[u8; 32], parts: &[&str]) -> blake3::Hash {
    // As one piece: to be handed many small ones costs the hasher more than to hash them.
    let mut input = Vec::with_capacity(parts.iter().map(|part| 4 + part.len()).sum());
    for part in parts {
        input.extend_from_slice(&(part.len() as u32).to_le_bytes());
        input.extend_from_slice(part.as_bytes());
    }
    blake3::keyed_hash(key, &input)
}

/// Writes the bytes into characters that have just room for them.
fn base64url<'a>(bytes: &[u8], chars: &'a mut [u8]) -> &'a str {
    let length = URL_SAFE_NO_PAD.encode_slice(bytes, chars).expect("there is room");
    str::from_utf8(&chars[..length]).expect("ASCII")
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Id {
    version: u8,
    lane: LaneId,
    key: EntityKey,
    tag: [u8; TAG_BYTES],
}

impl Id {
    fn text(&self, kind: Kind) -> String {
        // The head ends with a character, so both are encoded as one.
        let mut packed = [0; HEAD_BYTES + KEY_BYTES];
        packed[0] = self.version;
        packed[1] = self.lane.lane;
        packed[2..HEAD_BYTES].copy_from_slice(&self.tag);
        packed[HEAD_BYTES..].copy_from_slice(&self.key.0);
        let mut chars = [0; HEAD_CHARS + KEY_CHARS];
        [kind.prefix(), base64url(&packed, &mut chars), ".", self.lane.sale.as_str()].concat()
    }

    fn read(kind: Kind, text: &str) -> Result<Self, IdError> {
        let rest = text.strip_prefix(kind.prefix()).ok_or(IdError)?;
        let (packed, sale) = rest.split_once('.').ok_or(IdError)?;
        if packed.len() != HEAD_CHARS + KEY_CHARS || !packed.is_ascii() {
            return Err(IdError);
        }
        let (head, key) = packed.split_at(HEAD_CHARS);
        let mut bytes = [0; HEAD_BYTES];
        URL_SAFE_NO_PAD.decode_slice(head, &mut bytes).map_err(|_| IdError)?;
        let [version, lane, tag @ ..] = bytes;
        let sale = sale.parse().map_err(|_: NameError| IdError)?;
        let key = EntityKey::decode(key).ok_or(IdError)?;
        if lane >= LANES_MAX {
            return Err(IdError);
        }
        Ok(Self { version, lane: LaneId { sale, lane }, key, tag })
    }
}

/// The text is not an id of this kind, whoever may have made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id")]
pub struct IdError;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(Id);

        impl $name {
            pub fn lane(&self) -> &LaneId {
                &self.0.lane
            }

            pub fn key(&self) -> EntityKey {
                self.0.key
            }

            /// Which version of the secret it claims to be made with.
            pub fn secret_version(&self) -> u8 {
                self.0.version
            }

            /// Whether this id was made with this secret: false for one that somebody made up.
            pub fn is_genuine(&self, secret: &IdSecret) -> bool {
                secret.signed($kind, &self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0.text($kind))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Id::read($kind, text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0.text($kind))
            }
        }
    };
}

id!(
    /// An order's id. Parsing checks its form only; see [`OrderId::is_genuine`].
    OrderId, Kind::Order
);
id!(
    /// A stock adjustment's id. Parsing checks its form only; see [`AdjustmentId::is_genuine`].
    AdjustmentId, Kind::Adjustment
);
id!(
    /// A refund's id. Parsing checks its form only; see [`RefundId::is_genuine`].
    RefundId, Kind::Refund
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret() -> IdSecret {
        IdSecret::new(1, &[7; 32])
    }

    fn order_id(sale: &str, buyer: &str, key: &str) -> OrderId {
        let (sale, secret): (SaleId, _) = (sale.parse().unwrap(), secret());
        let key = secret.order_key(&sale, &buyer.parse().unwrap(), &key.parse().unwrap());
        secret.order_id(&LaneId { sale, lane: 3 }, key)
    }

    #[test]
    fn an_id_reads_back_as_itself_and_is_genuine() {
        let id = order_id("double-11", "u-42", "k");
        let read: OrderId = id.to_string().parse().unwrap();
        assert_eq!(read, id);
        assert!(read.is_genuine(&secret()));
        assert!(id.to_string().ends_with(&format!("{}.double-11", id.key().encode())));
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(order_id("s", "ab", "c").key(), order_id("s", "a", "bc").key());
        assert_ne!(order_id("s", "a", "b").key(), order_id("t", "a", "b").key());
    }

    #[test]
    fn an_order_id_is_no_adjustment_id_even_with_its_prefix_changed() {
        let forged = order_id("s", "b", "k").to_string().replace("ord_", "adj_");
        assert!(!forged.parse::<AdjustmentId>().unwrap().is_genuine(&secret()));
    }

    #[test]
    fn another_secret_or_version_does_not_vouch_for_an_id() {
        let id = order_id("s", "b", "k");
        assert!(!id.is_genuine(&IdSecret::new(1, &[8; 32])));
        assert!(!id.is_genuine(&IdSecret::new(2, &[7; 32])));
    }

    proptest! {
        #[test]
        fn any_one_changed_character_is_noticed(position in 4usize..42, with in "[A-Za-z0-9_-]") {
            let text = order_id("double-11", "u-42", "k").to_string();
            prop_assume!(text[position..=position] != with);
            let mut forged = text.clone();
            forged.replace_range(position..=position, &with);
            let genuine = forged.parse::<OrderId>().is_ok_and(|id| id.is_genuine(&secret()));
            prop_assert!(!genuine);
        }

        #[test]
        fn reading_never_panics(text in "\\PC*") {
            let read = text.parse::<OrderId>();
            if let Ok(id) = read {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
