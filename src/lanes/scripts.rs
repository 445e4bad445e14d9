//! The scripts in `lua/`, compiled in.

use redis::Cmd;

/// A Lua script, named by the SHA-1 of its source as `EVALSHA` wants it.
pub struct Script {
    source: &'static str,
    inner: redis::Script,
}

impl Script {
    fn new(source: &'static str) -> Self {
        Self { source, inner: redis::Script::new(source) }
    }

    /// Gives the script to a server.
    pub fn load(&self) -> Cmd {
        redis::cmd("SCRIPT").arg("LOAD").arg(self.source).to_owned()
    }

    /// The beginning of a call; the arguments follow.
    pub fn call(&self, keys: &[String]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(self.inner.get_hash()).arg(keys.len()).arg(keys);
        call
    }
}

/// All scripts of one process.
pub struct Scripts {
    /// Applies a batch of commands to a lane.
    pub lane: Script,
    /// Moves marks and trims the outbox.
    pub advance: Script,
    /// Takes an archived lane out of Redis.
    pub forget: Script,
    /// Shows a page of a lane's hash.
    pub look: Script,
    /// Opens a frozen lane anew.
    pub recover: Script,
}

impl Scripts {
    pub fn new() -> Self {
        Self {
            lane: Script::new(concat!(
                include_str!("../../lua/lane/1_read.lua"),
                include_str!("../../lua/lane/2_orders.lua"),
                include_str!("../../lua/lane/3_stock.lua"),
                include_str!("../../lua/lane/4_write.lua"),
            )),
            advance: Script::new(include_str!("../../lua/advance.lua")),
            forget: Script::new(include_str!("../../lua/forget.lua")),
            look: Script::new(include_str!("../../lua/look.lua")),
            recover: Script::new(include_str!("../../lua/recover.lua")),
        }
    }
}

impl Default for Scripts {
    fn default() -> Self {
        Self::new()
    }
}
