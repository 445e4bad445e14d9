//! Schemas of the names, ids and times of the domain, for `openapi.json`. All are strings whose
//! form their own types check.

use std::borrow::Cow;

use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::extract::{TEXT_CHARS_MAX, Text};
use crate::domain::ids::{AdjustmentId, OrderId, RefundId};
use crate::domain::names::{BuyerId, IdempotencyKey, KeyName, PaymentId, SaleId, Sku};
use crate::domain::order::{QUANTITY_MAX, Quantity};
use crate::domain::time::Timestamp;

const TOKEN: &str = "^[A-Za-z0-9._-]+$";
const VISIBLE_ASCII: &str = "^[!-~]+$";

macro_rules! schema {
    ($($type:ident $build:expr;)*) => {
        $(
            impl PartialSchema for $type {
                fn schema() -> RefOr<Schema> {
                    let build: fn(ObjectBuilder) -> ObjectBuilder = $build;
                    build(ObjectBuilder::new().schema_type(Type::String)).into()
                }
            }

            impl ToSchema for $type {
                fn name() -> Cow<'static, str> {
                    Cow::Borrowed(stringify!($type))
                }
            }
        )*
    };
}

fn text(build: ObjectBuilder, pattern: &str, max: usize) -> ObjectBuilder {
    build.min_length(Some(1)).max_length(Some(max)).pattern(Some(pattern))
}

schema! {
    SaleId |s| text(s, TOKEN, 64);
    Sku |s| text(s, TOKEN, 64);
    KeyName |s| text(s, TOKEN, 64);
    BuyerId |s| text(s, VISIBLE_ASCII, 128);
    PaymentId |s| text(s, VISIBLE_ASCII, 255);
    IdempotencyKey |s| text(s, VISIBLE_ASCII, 255);
    OrderId |s| s.description(Some("Opaque"));
    AdjustmentId |s| s.description(Some("Opaque"));
    RefundId |s| s.description(Some("Opaque"));
    Text |s| s.min_length(Some(1)).max_length(Some(TEXT_CHARS_MAX));
    Timestamp |s| s
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
        .description(Some("RFC 3339; answers are in UTC with milliseconds"));
    Quantity |s| s
        .schema_type(Type::Integer)
        .minimum(Some(1))
        .maximum(Some(QUANTITY_MAX));
}
