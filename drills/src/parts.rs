//! The real parts of a drill's stack, each its own process: Redis and the service as children of
//! ours, Kafka and PostgreSQL by `dev`. All run below the stack's directory, where `dev down` finds
//! them, whatever becomes of us.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long anything that must come about may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Where a process of the service is to kill or stop itself: `src/failpoint.rs`.
const FAILPOINT: &str = "FAILPOINT";
/// Ports of the service's processes, counted from the stack's first.
const SERVICE_PORTS: std::ops::Range<u16> = 20..60;
/// What fills a small disk, on it.
const FILLING: &str = "filling";
const SMALL_DISK: &str = "size=256m";

/// Waits until `condition` holds.
pub async fn eventually(
    what: &str,
    mut condition: impl AsyncFnMut() -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        if Instant::now() > deadline {
            bail!("not in {PATIENCE:?}: {what}");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Runs a command to its end, and holds up nobody meanwhile: who gives up waiting for it has it killed.
async fn output(mut command: Command) -> anyhow::Result<Output> {
    struct Hanging(Option<u32>);
    impl Drop for Hanging {
        fn drop(&mut self) {
            if let Some(error) = self.0.and_then(|pid| signal(pid, "KILL").err()) {
                eprintln!("{error}");
            }
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    let mut hanging = Hanging(Some(child.id()));
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await?;
    hanging.0 = None;
    Ok(output?)
}

/// Sends a signal by its name; the process may have ended already.
fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(Stdio::null()).status()?;
    Ok(())
}

/// The stack's directory and ports; Kafka and PostgreSQL in it.
pub struct Stack {
    pub home: PathBuf,
    pub port_base: u16,
    dev: PathBuf,
    ports_given: AtomicU16,
    /// Where the file system is mounted that one of its servers has to itself.
    small_disk: Option<PathBuf>,
}

impl Stack {
    /// Starts Kafka and PostgreSQL.
    pub fn start(home: PathBuf, port_base: u16, dev: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&home)?;
        let home = home.canonicalize()?;
        let stack = Self::at(home, port_base, dev);
        stack.start_servers()?;
        Ok(stack)
    }

    fn at(home: PathBuf, port_base: u16, dev: PathBuf) -> Self {
        Self { home, port_base, dev, ports_given: AtomicU16::new(0), small_disk: None }
    }

    fn start_servers(&self) -> anyhow::Result<()> {
        self.dev(&["start", "postgres"])?;
        self.dev(&["start", "kafka"])
    }

    /// A port that nobody listens at. Of the stack's own range: one of those that the system gives to
    /// whoever asks for any could be gone before it is used.
    fn free_port(&self) -> anyhow::Result<u16> {
        for _ in SERVICE_PORTS {
            let number = self.ports_given.fetch_add(1, Ordering::Relaxed);
            let port = self.port_base + SERVICE_PORTS.start + number % SERVICE_PORTS.len() as u16;
            if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return Ok(port);
            }
        }
        bail!("no port from {} on is free: {SERVICE_PORTS:?}", self.port_base)
    }

    /// One beside this, made anew, where a server keeps its files on a small file system of its own.
    pub fn with_small_disk(&self, part: &str) -> anyhow::Result<Self> {
        let home = self.home.with_file_name("small-disk");
        let mut stack = Self::at(home, self.port_base + 10, self.dev.clone());
        // Of a run that was killed.
        stack.dev(&["down"])?;
        for left in ["postgres", "kafka"].map(|part| stack.home.join(part)) {
            Command::new("umount").arg(left).stderr(Stdio::null()).status()?;
        }
        std::fs::remove_dir_all(&stack.home)?;
        let at = stack.home.join(part);
        std::fs::create_dir_all(&at)?;
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", SMALL_DISK, "tmpfs"]).arg(&at).output()?;
        if !mounted.status.success() {
            let said = String::from_utf8_lossy(&mounted.stderr);
            bail!("a file system cannot be mounted, which needs root: {}", said.trim());
        }
        stack.small_disk = Some(at);
        stack.start_servers()?;
        Ok(stack)
    }

    fn filling(&self) -> anyhow::Result<PathBuf> {
        let small_disk = self.small_disk.as_ref().context("the stack has no small disk")?;
        Ok(small_disk.join(FILLING))
    }

    /// Leaves no byte of the small disk free.
    pub fn fill_disk(&self) -> anyhow::Result<()> {
        let mut filling = File::create(self.filling()?)?;
        let page = [0; 4096];
        loop {
            match filling.write_all(&page) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn free_disk(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.filling()?)?)
    }

    /// How often a server has said that its disk is full.
    pub fn complaints_of_disk(&self, part: &str) -> anyhow::Result<usize> {
        let log = std::fs::read(self.home.join("logs").join(format!("{part}.log")))?;
        Ok(String::from_utf8_lossy(&log).matches("No space left on device").count())
    }

    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port_base + 3)
    }

    pub fn postgres_port(&self) -> u16 {
        self.port_base + 4
    }

    pub async fn up(&self, part: &str) -> anyhow::Result<()> {
        let arguments = ["start", part];
        succeeded(&arguments, output(self.dev_command(&arguments)).await?).map(drop)
    }

    /// SIGKILL.
    pub async fn kill(&self, part: &str) -> anyhow::Result<()> {
        let arguments = ["kill", part];
        succeeded(&arguments, output(self.dev_command(&arguments)).await?).map(drop)
    }

    fn dev(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let output = self.dev_command(arguments).stdin(Stdio::null()).output()?;
        succeeded(arguments, output).map(drop)
    }

    fn dev_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.dev);
        let port_base = self.port_base.to_string();
        command.args(arguments).env("HOLDFAST_HOME", &self.home);
        command.env("HOLDFAST_PORT_BASE", port_base);
        command
    }
}

/// What a command printed, if it succeeded.
fn succeeded(arguments: &[&str], output: Output) -> anyhow::Result<String> {
    if !output.status.success() {
        bail!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Err(error) = self.dev(&["down"]) {
            eprintln!("{error}");
        }
        if let Some(small_disk) = &self.small_disk
            && let Err(error) = Command::new("umount").arg(small_disk).status()
        {
            eprintln!("{}: {error}", small_disk.display());
        }
    }
}

/// A child that can be killed, stopped and started again, with the same command line.
struct Process {
    name: String,
    dir: PathBuf,
    log: PathBuf,
    program: PathBuf,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    child: Mutex<Option<Child>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    /// `more`: variables of this run alone.
    fn start(&self, more: &[(&str, String)]) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let log = File::options().create(true).append(true).open(&self.log)?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.variables.iter().cloned())
            .envs(more.iter().cloned())
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} cannot be started", self.name))?;
        *self.child.lock().expect("no panic with the child") = Some(child);
        Ok(())
    }

    fn kill(&self) {
        let child = self.child.lock().expect("no panic with the child").take();
        if let Some(mut child) = child {
            // Both fail only where it has ended already, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let child = self.child.lock().expect("no panic with the child");
        let child = child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        signal(child.id(), name)
    }

    /// Whether it is stopped, as by SIGSTOP.
    fn is_stopped(&self) -> anyhow::Result<bool> {
        let child = self.child.lock().expect("no panic with the child");
        let child = child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
        // Its name, which stands before its state, may contain anything.
        Ok(stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
    }

    /// How it has ended by itself, if it has.
    fn exit_status(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().expect("no panic with the child");
        child.as_mut()?.try_wait().ok()?
    }

    fn ended(&self) -> Option<String> {
        let status = self.exit_status()?;
        Some(format!("{} ended by itself, {status}; its log is {}", self.name, self.log.display()))
    }
}

/// The wall clock of a process, which can be set while the process runs (`drills/clock`).
pub struct Clock {
    library: PathBuf,
    path: PathBuf,
}

impl Clock {
    /// Goes right at first.
    pub fn new(library: PathBuf, path: PathBuf) -> anyhow::Result<Self> {
        if !library.exists() {
            bail!("there is no {}", library.display());
        }
        std::fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        std::fs::write(&path, 0_i64.to_le_bytes())?;
        Ok(Self { library, path })
    }

    /// From now on it goes ahead by so much. The file stays the same one: processes have it mapped.
    pub fn set(&self, ahead_ms: i64) -> anyhow::Result<()> {
        let file = File::options().write(true).open(&self.path)?;
        Ok(file.write_all_at(&ahead_ms.to_le_bytes(), 0)?)
    }

    /// What a process needs in its environment to go by it.
    pub fn variables(&self) -> [(String, String); 2] {
        let text = |path: &Path| path.display().to_string();
        [("LD_PRELOAD".into(), text(&self.library)), ("DRILL_CLOCK".into(), text(&self.path))]
    }
}

/// A Redis of the drill's own.
pub struct Redis {
    pub port: u16,
    process: Process,
}

impl Redis {
    /// `options` as on the command line of `redis-server`.
    pub async fn start(
        home: &Path,
        name: &str,
        port: u16,
        options: &[&str],
        clock: Option<&Clock>,
    ) -> anyhow::Result<Self> {
        let dir = home.join("redis").join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        let fixed = [
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "yes",
            "--maxmemory",
            "1gb",
            "--maxmemory-policy",
            "noeviction",
        ]
        .map(str::to_owned);
        let process = Process {
            name: format!("redis {name}"),
            log: home.join("logs").join(format!("redis-{name}.log")),
            dir,
            program: "redis-server".into(),
            arguments: fixed.into_iter().chain(options.iter().map(|&word| word.into())).collect(),
            variables: clock.map(Clock::variables).into_iter().flatten().collect(),
            child: Mutex::default(),
        };
        let redis = Self { port, process };
        redis.start_again().await?;
        Ok(redis)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.process.dir
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.process.kill();
    }

    pub async fn start_again(&self) -> anyhow::Result<()> {
        self.process.start(&[])?;
        eventually("Redis answers", async || self.ask::<String>(&redis::cmd("PING")).await.is_ok())
            .await
    }

    pub async fn ask<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> anyhow::Result<T> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        Ok(command.query_async(&mut connection).await?)
    }

    /// What `INFO` says of something; empty where it is not mentioned.
    pub async fn info_word(&self, section: &str, name: &str) -> anyhow::Result<String> {
        let said: String = self.ask(redis::cmd("INFO").arg(section)).await?;
        let word = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(word.unwrap_or_default().trim().to_owned())
    }

    /// What `TIME` says, in milliseconds.
    pub async fn time_ms(&self) -> anyhow::Result<i64> {
        let (seconds, microseconds): (i64, i64) = self.ask(&redis::cmd("TIME")).await?;
        Ok(seconds * 1000 + microseconds / 1000)
    }

    /// The same, of a number or a count; 0 where it is not mentioned.
    pub async fn info(&self, section: &str, name: &str) -> anyhow::Result<u64> {
        let word = self.info_word(section, name).await?;
        let number = word.trim_start_matches("count=");
        Ok(if number.is_empty() { 0 } else { number.parse()? })
    }
}

/// One process of the service.
pub struct Service {
    pub name: String,
    pub url: String,
    inner_url: String,
    process: Process,
    http: reqwest::Client,
}

impl Service {
    pub async fn start(
        stack: &Stack,
        binary: &Path,
        name: &str,
        roles: &str,
        settings: &[(String, String)],
    ) -> anyhow::Result<Self> {
        let (home, port, inner_port) = (&stack.home, stack.free_port()?, stack.free_port()?);
        let mut variables = settings.to_vec();
        variables.push(("HOLDFAST_HTTP__LISTEN".into(), format!("127.0.0.1:{port}")));
        variables.push(("HOLDFAST_HTTP__INNER_LISTEN".into(), format!("127.0.0.1:{inner_port}")));
        let process = Process {
            name: format!("service {name}"),
            dir: home.join("holdfast").join(name),
            log: home.join("logs").join(format!("holdfast-{name}.log")),
            program: binary.into(),
            arguments: ["serve", "--roles", roles].map(str::to_owned).into(),
            variables,
            child: Mutex::default(),
        };
        let service = Self {
            name: name.into(),
            url: format!("http://127.0.0.1:{port}"),
            inner_url: format!("http://127.0.0.1:{inner_port}"),
            process,
            http: reqwest::Client::new(),
        };
        service.start_again().await?;
        Ok(service)
    }

    /// Returns when it is ready.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        self.process.start(&[])?;
        self.ready().await
    }

    pub async fn ready(&self) -> anyhow::Result<()> {
        let url = format!("{}/readyz", self.inner_url);
        eventually(&format!("{} is ready", self.name), async || {
            let answer = self.http.get(&url).timeout(Duration::from_secs(2)).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Starts it, and returns when it has killed itself at its passing of this point.
    pub async fn die_at(&self, point: &str, passing: u32) -> anyhow::Result<()> {
        self.process.start(&[(FAILPOINT, format!("{point}:{passing}"))])?;
        let what = format!("{} dies at {point}, passing {passing}", self.name);
        eventually(&what, async || self.process.exit_status().is_some()).await?;
        let status = self.process.exit_status().context("it has ended")?;
        if !was_killed(status) {
            bail!("{} ended before {point}: {status}", self.name);
        }
        Ok(())
    }

    /// Starts it; at its passing of this point it will stop itself.
    pub fn start_to_stop_at(&self, point: &str, passing: u32) -> anyhow::Result<()> {
        self.process.start(&[(FAILPOINT, format!("{point}:{passing}:stop"))])
    }

    /// Returns when it has stopped itself.
    pub async fn stopped(&self) -> anyhow::Result<()> {
        let stopped = async || self.process.is_stopped().is_ok_and(|stopped| stopped);
        eventually(&format!("{} stops itself", self.name), stopped).await
    }

    pub fn freeze(&self) -> anyhow::Result<()> {
        self.process.signal("STOP")
    }

    pub fn thaw(&self) -> anyhow::Result<()> {
        self.process.signal("CONT")
    }

    /// SIGTERM, and waits until it has ended.
    pub async fn terminate(&self) -> anyhow::Result<()> {
        self.process.signal("TERM")?;
        let name = format!("{} ends", self.name);
        eventually(&name, async || self.process.ended().is_some()).await?;
        self.process.kill();
        Ok(())
    }

    pub fn ended(&self) -> Option<String> {
        self.process.ended()
    }

    /// The sum over a metric's labels. One that is not there is an error: it would be taken for 0.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let url = format!("{}/metrics", self.inner_url);
        let answer = self.http.get(url).timeout(Duration::from_secs(5)).send().await?;
        let text = answer.error_for_status()?.text().await?;
        let lines = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
        });
        let values = lines.map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<f64>());
        let values: Vec<_> = values.collect::<Result<_, _>>()?;
        if values.is_empty() {
            bail!("{} has no metric {name}", self.name);
        }
        Ok(values.iter().sum())
    }
}

fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(9)
}

/// Runs the service's binary until it has killed itself at its passing of this point.
pub async fn run_to_death(
    binary: &Path,
    settings: &[(String, String)],
    arguments: &[&str],
    (point, passing): (&str, u32),
) -> anyhow::Result<()> {
    let mut command = Command::new(binary);
    command.args(arguments).envs(settings.iter().cloned());
    command.env(FAILPOINT, format!("{point}:{passing}"));
    let output = output(command).await?;
    if !was_killed(output.status) {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("holdfast {arguments:?} ended before {point}, {}: {said}", output.status);
    }
    Ok(())
}

/// Runs the service's binary to its end and returns what it printed.
pub async fn run(
    binary: &Path,
    settings: &[(String, String)],
    arguments: &[&str],
) -> anyhow::Result<String> {
    let mut command = Command::new(binary);
    command.args(arguments).envs(settings.iter().cloned());
    succeeded(arguments, output(command).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_when_nobody_waits_for_it_any_more() {
        let name = format!("hangs-{}", std::process::id());
        let mut command = Command::new("sh");
        // Its own argument tells it from every other process.
        command.args(["-c", "while :; do sleep 0.1; done", &name]);
        let runs = || {
            let processes = std::fs::read_dir("/proc").expect("processes").flatten();
            processes.into_iter().any(|process| {
                let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&name) && line.starts_with(b"sh\0")
            })
        };
        let hanging = tokio::time::timeout(Duration::from_millis(500), output(command));
        assert!(hanging.await.is_err(), "it ended by itself");
        eventually("it is gone", async || !runs()).await.expect("it was killed");
        let mut command = Command::new("sh");
        command.args(["-c", "echo said"]);
        let said = succeeded(&[], output(command).await.expect("it runs")).expect("it succeeds");
        assert_eq!(said, "said");
    }
}
