//! Accepting connections: HTTP/1.1 and, by prior knowledge, HTTP/2 on one listener, with bounds on
//! how long a head may take, and an end in order.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use axum::Router;
use axum_server::accept::Accept;
use axum_server::{Handle, Server};
use hyper_util::rt::TokioTimer;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::config::{self, millis};

/// The longest head (RFC 9112: request line and headers); beyond it the parser answers 431.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const H2_HEAD_BYTES_MAX: u32 = 16 * 1024;
const H2_STREAMS_MAX: u32 = 256;
/// How HTTP/2 begins (RFC 9113, 3.4): what is none of its beginnings is HTTP/1.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often a connection that has sent a part of the preface is looked at.
const PREFACE_INTERVAL: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy)]
pub struct ServeOptions {
    pub header_timeout: Duration,
    /// How long requests in flight may take to end once shut down.
    pub drain_timeout: Duration,
}

impl ServeOptions {
    pub fn new(config: &config::Http) -> Self {
        Self {
            header_timeout: millis(config.header_timeout_ms),
            drain_timeout: millis(config.drain_timeout_ms),
        }
    }
}

/// Serves until shut down, then accepts no more, lets what is in flight end, and returns.
///
/// # Errors
/// A listener that cannot be used.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let handle = Handle::new();
    let first_bytes = FirstBytes { timeout: options.header_timeout, shutdown: shutdown.clone() };
    let mut server =
        Server::<SocketAddr>::from_listener(listener).acceptor(first_bytes).handle(handle.clone());
    let builder = server.http_builder();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(options.header_timeout)
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(H2_HEAD_BYTES_MAX);
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let serving = server.serve(service);
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        () = shutdown.cancelled() => handle.graceful_shutdown(Some(options.drain_timeout)),
    }
    serving.await
}

/// Waits until a connection has said which HTTP it speaks. The server that follows has a time-out
/// for the head, but waits for its first bytes for ever.
#[derive(Debug, Clone)]
struct FirstBytes {
    timeout: Duration,
    shutdown: CancellationToken,
}

impl<S: Send + 'static> Accept<TcpStream, S> for FirstBytes {
    type Stream = TcpStream;
    type Service = S;
    type Future = Pin<Box<dyn Future<Output = io::Result<(TcpStream, S)>> + Send>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let Self { timeout, shutdown } = self.clone();
        Box::pin(async move {
            stream.set_nodelay(true)?;
            tokio::select! {
                spoken = tokio::time::timeout(timeout, spoken(&stream)) => spoken??,
                () = shutdown.cancelled() => return Err(io::ErrorKind::Interrupted.into()),
            }
            Ok((stream, service))
        })
    }
}

/// Returns once the first bytes are the whole preface, or cannot become it.
async fn spoken(stream: &TcpStream) -> io::Result<()> {
    let mut first = [0; H2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut first).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if count == first.len() || !H2_PREFACE.starts_with(&first[..count]) {
            return Ok(());
        }
        tokio::time::sleep(PREFACE_INTERVAL).await;
    }
}
