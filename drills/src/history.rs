//! What callers asked and were answered, with times: the only witness of their side. One JSON line
//! an attempt, so that a request that was sent again has several.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// SKU and units.
pub type Lines = BTreeMap<String, i64>;

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    i64::try_from(since.as_millis()).expect("a clock before the year 292 million")
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    pub client: String,
    /// Which of the service's instances was asked.
    pub instance: usize,
    /// The durability that its answer was to wait for (`Prefer`), where the caller named one.
    pub asked: Option<String>,
    pub sent_ms: i64,
    /// Of an unknown outcome: when the caller knew that it would not be told.
    pub answered_ms: i64,
    pub request: Request,
    pub reply: Reply,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub enum Request {
    Define {
        sale: String,
        definition: Value,
    },
    Place {
        sale: String,
        buyer: String,
        key: String,
        lines: Lines,
        hold_seconds: Option<i64>,
    },
    BeginPayment {
        order: String,
        payment: String,
    },
    /// No lines: all that is held.
    Confirm {
        order: String,
        payment: String,
        lines: Option<Lines>,
    },
    Cancel {
        order: String,
    },
    CancelByKey {
        sale: String,
        buyer: String,
        key: String,
    },
    Return {
        order: String,
        key: String,
        lines: Option<Lines>,
        restock: bool,
    },
    Webhook {
        order: String,
        payment: String,
        succeeded: bool,
    },
    Adjust {
        sale: String,
        sku: String,
        key: String,
        delta: i64,
    },
    /// Only where the SKU's counters are of this version.
    SetTotal {
        sale: String,
        sku: String,
        key: String,
        total: i64,
        version: i64,
    },
    Undo {
        adjustment: String,
        key: String,
    },
    SettleRefund {
        refund: String,
    },
    Pause {
        sale: String,
    },
    Resume {
        sale: String,
    },
    Close {
        sale: String,
    },
    Get {
        order: String,
    },
    Stock {
        sale: String,
    },
}

impl Request {
    /// Whether its caller may say how durable the answer shall be: a payment provider says no such thing,
    /// and what an operator changes is answered as it always is.
    pub fn takes_a_preference(&self) -> bool {
        self.shows_an_order() && !matches!(self, Self::Get { .. })
    }

    /// Whether a 2xx on it shows the order that it is about.
    pub fn shows_an_order(&self) -> bool {
        matches!(
            self,
            Self::Place { .. }
                | Self::BeginPayment { .. }
                | Self::Confirm { .. }
                | Self::Cancel { .. }
                | Self::CancelByKey { .. }
                | Self::Return { .. }
                | Self::Get { .. }
        )
    }

    /// Whether it ends what an order holds, one way or the other.
    pub fn settles(&self) -> bool {
        matches!(self, Self::Confirm { .. } | Self::Cancel { .. } | Self::Webhook { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Ok,
    /// The answer says that nothing was done.
    Refused,
    /// No answer, or one that says that nobody knows.
    Unknown,
}

/// How far an answer had got: what it outlives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    #[default]
    Memory,
    Replicated,
    Logged,
    Recorded,
}

impl Level {
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "memory" => Some(Self::Memory),
            "replicated" => Some(Self::Replicated),
            "logged" => Some(Self::Logged),
            "recorded" => Some(Self::Recorded),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    pub outcome: Outcome,
    /// None: no answer came.
    pub status: Option<u16>,
    pub code: Option<String>,
    pub replayed: bool,
    /// What `Preference-Applied` says of its durability.
    pub applied: Option<Level>,
    pub body: Value,
}

/// An order as an answer shows it.
#[derive(Debug, Clone)]
pub struct Shown<'a> {
    pub id: &'a str,
    pub status: &'a str,
    pub payment: Option<&'a str>,
    pub expires_ms: i64,
    pub lines: Lines,
    pub returned: Lines,
}

/// `[{"sku", "quantity"}]` as answers and events have it.
pub fn lines_of(value: &Value) -> Lines {
    let lines = value.as_array().into_iter().flatten();
    lines
        .filter_map(|line| Some((line["sku"].as_str()?.to_owned(), line["quantity"].as_i64()?)))
        .collect()
}

/// RFC 3339 to milliseconds since 1970.
pub fn time_of(value: &Value) -> Option<i64> {
    let time = chrono::DateTime::parse_from_rfc3339(value.as_str()?).ok()?;
    Some(time.timestamp_millis())
}

impl Reply {
    /// The order that it shows: the answer itself, or what a refusal is about.
    pub fn order(&self) -> Option<Shown<'_>> {
        let order = if self.body["order"].is_object() { &self.body["order"] } else { &self.body };
        let id = order["id"].as_str().filter(|id| id.starts_with("ord_"))?;
        Some(Shown {
            id,
            status: order["status"].as_str()?,
            payment: order["payment_id"].as_str(),
            expires_ms: time_of(&order["expires_at"])?,
            lines: lines_of(&order["lines"]),
            returned: lines_of(&order["returned"]),
        })
    }
}

/// Written as it grows, so that whatever ends the drill, it is there.
pub struct History {
    file: Mutex<BufWriter<File>>,
    entries: Mutex<Vec<Entry>>,
    ok: AtomicU64,
}

impl History {
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Self {
            file: Mutex::new(BufWriter::new(file)),
            entries: Mutex::default(),
            ok: AtomicU64::new(0),
        })
    }

    pub fn record(&self, entry: Entry) {
        if entry.reply.outcome == Outcome::Ok {
            self.ok.fetch_add(1, Ordering::Relaxed);
        }
        let line = serde_json::to_string(&entry).expect("an entry is JSON");
        let mut file = self.file.lock().expect("no panic while writing");
        writeln!(file, "{line}").and_then(|()| file.flush()).expect("the history can be written");
        self.entries.lock().expect("no panic while adding").push(entry);
    }

    /// Requests that were answered with a 2xx so far.
    pub fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().expect("no panic while adding").clone()
    }

    /// How many entries that began since then fit.
    pub fn count_since(&self, since_ms: i64, fits: impl Fn(&Entry) -> bool) -> usize {
        let entries = self.entries.lock().expect("no panic while adding");
        entries.iter().filter(|entry| entry.answered_ms >= since_ms && fits(entry)).count()
    }
}
