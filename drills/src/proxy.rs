//! A TCP proxy between the service and a server: it loses replies of requests that were sent, delays
//! them, and leads to another server from one moment to the next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of what the server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replies {
    Pass,
    /// The request has reached the server; its reply is lost, and the connection with it.
    Lose,
    Delay(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    /// The server's port on this machine.
    to: u16,
    replies: Replies,
}

/// Serves until it is dropped.
pub struct Proxy {
    pub port: u16,
    mode: watch::Sender<Mode>,
    lost: Arc<AtomicU64>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Proxy {
    pub async fn start(to: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let (mode, _) = watch::channel(Mode { to, replies: Replies::Pass });
        let lost = Arc::new(AtomicU64::new(0));
        let accepting = tokio::spawn(accept(listener, mode.clone(), lost.clone()));
        Ok(Self { port, mode, lost, accepting })
    }

    pub fn replies(&self, replies: Replies) {
        self.mode.send_modify(|mode| mode.replies = replies);
    }

    /// Cuts every connection; the next ones lead to this port.
    pub fn lead_to(&self, to: u16) {
        self.mode.send_modify(|mode| mode.to = to);
    }

    pub fn leads_to(&self) -> u16 {
        self.mode.borrow().to
    }

    /// Replies lost so far.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, mode: watch::Sender<Mode>, lost: Arc<AtomicU64>) {
    while let Ok((client, _)) = listener.accept().await {
        let (mode, lost) = (mode.subscribe(), lost.clone());
        // What fails here ends the connection, as it would without us.
        tokio::spawn(async move { carry(client, mode, &lost).await });
    }
}

async fn carry(
    mut client: TcpStream,
    mut mode: watch::Receiver<Mode>,
    lost: &AtomicU64,
) -> std::io::Result<()> {
    let to = mode.borrow().to;
    let mut server = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], to))).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut asked, mut said) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        tokio::select! {
            length = client.read(&mut asked) => match length? {
                0 => return Ok(()),
                length => server.write_all(&asked[..length]).await?,
            },
            length = server.read(&mut said) => {
                let length = length?;
                if length == 0 {
                    return Ok(());
                }
                let replies = mode.borrow().replies;
                match replies {
                    Replies::Pass => {}
                    Replies::Lose => {
                        lost.fetch_add(1, Ordering::Relaxed);
                        return Ok(());
                    }
                    Replies::Delay(delay) => tokio::time::sleep(delay).await,
                }
                client.write_all(&said[..length]).await?;
            }
            changed = mode.changed() => if changed.is_err() || mode.borrow().to != to {
                return Ok(());
            },
        }
    }
}
