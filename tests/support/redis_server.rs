//! A `redis-server` that belongs to one test or benchmark alone.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A real server on a Unix socket in a directory of its own, without files; killed when dropped.
pub struct RedisServer {
    child: Child,
    dir: PathBuf,
}

impl RedisServer {
    /// Starts one and waits until it takes connections. `options` as in `redis.conf`, in pairs.
    pub fn start(options: &[(&str, &str)]) -> Self {
        // A socket's path may have 100 characters or so, hence the short name.
        let dir = std::env::temp_dir().join(format!("hf-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&dir).expect("a directory for Redis");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--dir"]).arg(&dir);
        command.arg("--unixsocket").arg(dir.join("redis.sock"));
        for (name, value) in options {
            command.arg(format!("--{name}")).args(value.split(' '));
        }
        let child = command.stdout(Stdio::piped()).spawn();
        let mut server = Self { child: child.expect("redis-server is installed"), dir };
        let said = server.child.stdout.take().expect("its output is piped");
        // Redis goes on when nobody reads its log any more: it ignores SIGPIPE.
        let ready = BufReader::new(said).lines().map_while(Result::ok);
        let said: Vec<_> = ready.take_while(|line| !line.contains("eady to accept")).collect();
        assert!(server.dir.join("redis.sock").exists(), "redis-server did not start: {said:#?}");
        server
    }

    pub fn url(&self) -> String {
        format!("unix://{}", self.dir.join("redis.sock").display())
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // Both fail only where the server is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
