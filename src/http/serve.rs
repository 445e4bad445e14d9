//! Accepting connections: HTTP/1.1 and, by prior knowledge, HTTP/2 on one listener, with bounds on
//! how many there are, how long a head may take, how long a connection may rest and how long an answer
//! may lie untaken, and an end in order.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::quiet::quiet;
use crate::config::{self, millis};

/// The longest head (RFC 9112: request line and headers); beyond it the parser answers 431.
const HEAD_BYTES_MAX: usize = 64 * 1024;
const H2_HEAD_BYTES_MAX: u32 = 16 * 1024;
const H2_STREAMS_MAX: u32 = 256;
/// How HTTP/2 begins (RFC 9113, 3.4): what is none of its beginnings is HTTP/1.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often a connection that has sent a part of the preface is looked at.
const PREFACE_INTERVAL: Duration = Duration::from_millis(5);
/// How long nobody is accepted after that has failed, most likely for want of open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy)]
pub struct ServeOptions {
    pub header_timeout: Duration,
    /// How long a connection may rest between two requests (HTTP/1.1).
    pub idle_timeout: Duration,
    /// How long the peer may leave what it was sent untaken. The kernel's own patience is a quarter
    /// of an hour, and until then the answer takes memory.
    pub write_timeout: Duration,
    /// How long requests in flight may take to end once shut down.
    pub drain_timeout: Duration,
    pub connections_max: usize,
}

impl ServeOptions {
    pub fn new(config: &config::Http) -> Self {
        Self {
            header_timeout: millis(config.header_timeout_ms),
            idle_timeout: millis(config.idle_timeout_ms),
            write_timeout: millis(config.write_timeout_ms),
            drain_timeout: millis(config.drain_timeout_ms),
            connections_max: config.connections_max,
        }
    }
}

/// What a listener tells of its connections.
#[derive(Debug, Clone, Default)]
pub struct ConnectionMetrics {
    open: Gauge,
    refused: Counter,
}

impl ConnectionMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("holdfast_http");
        registry.register("connections", "Connections that are open", metrics.open.clone());
        registry.register(
            "connections_refused",
            "Connections closed at once since http.connections_max were open",
            metrics.refused.clone(),
        );
        metrics
    }
}

/// Who answers a listener's requests, each with the address of the peer.
pub trait Front:
    Service<(SocketAddr, Request), Response = Response, Error = Infallible, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Front for S where
    S: Service<(SocketAddr, Request), Response = Response, Error = Infallible, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// Serves until shut down, then accepts no more, lets what is in flight end, and returns.
pub async fn serve(
    listener: TcpListener,
    front: impl Front,
    options: ServeOptions,
    metrics: ConnectionMetrics,
    shutdown: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(options.connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = places.clone().try_acquire_owned() else {
            metrics.refused.inc();
            continue;
        };
        let place = Place::new(permit, metrics.open.clone());
        let (front, shutdown) = (front.clone(), shutdown.clone());
        connections.spawn(async move {
            if let Err(error) = connection(stream, peer, front, options, shutdown).await {
                tracing::debug!(%peer, %error, "a connection has ended");
            }
            drop(place);
        });
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    // Whoever is not done by then is cut off when the set is dropped.
    timeout(options.drain_timeout, ended).await.ok();
}

/// One connection's place among `http.connections_max`.
struct Place {
    _permit: OwnedSemaphorePermit,
    open: Gauge,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit, open: Gauge) -> Self {
        open.inc();
        Self { _permit: permit, open }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Serves one connection to its end. First it waits until the peer has said which HTTP it speaks: what
/// follows has a time-out for the head, but waits for its first bytes for ever.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    front: impl Front,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    SockRef::from(&stream).set_tcp_user_timeout(Some(options.write_timeout))?;
    let spoken = tokio::select! {
        spoken = timeout(options.header_timeout, spoken(&stream)) => spoken??,
        () = shutdown.cancelled() => return Ok(()),
    };
    let heads = Arc::new(AtomicU64::new(0));
    let service = service(front, peer, heads.clone());
    match spoken {
        Spoken::Http1 => {
            let stream = TimedStream::new(stream, options.header_timeout, heads);
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                // To hyper a rest and a head that does not come are one; TimedStream tells them apart.
                .header_read_timeout(options.idle_timeout)
                .max_buf_size(HEAD_BYTES_MAX)
                // A read may bring twice the buffer.
                .max_header_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), service);
            Ok(until_shut_down(serving, shutdown).await?)
        }
        Spoken::Http2 => {
            let serving = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(options.header_timeout)
                .max_concurrent_streams(H2_STREAMS_MAX)
                .max_header_list_size(H2_HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), service);
            Ok(until_shut_down(serving, shutdown).await?)
        }
    }
}

/// Serves until shut down, then to the end of what is in flight.
async fn until_shut_down<C: GracefulConnection>(
    connection: C,
    shutdown: CancellationToken,
) -> Result<(), C::Error> {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        ended = quiet(connection.as_mut()) => return ended,
        () = quiet(shutdown.cancelled()) => {}
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// Answers a connection's requests, and counts their heads.
fn service(
    front: impl Front,
    peer: SocketAddr,
    heads: Arc<AtomicU64>,
) -> impl HttpService<Incoming, ResBody = Body, Error = Infallible, Future: Send> {
    service_fn(move |request: hyper::Request<Incoming>| {
        heads.fetch_add(1, Ordering::Relaxed);
        front.clone().call((peer, request.map(Body::new)))
    })
}

/// A connection (HTTP/1) that fails where a head that has begun does not come whole in time.
struct TimedStream {
    stream: TcpStream,
    timeout: Duration,
    /// Heads that have come whole, and how many of them had when something was last sent.
    heads: Arc<AtomicU64>,
    answered: u64,
    /// How many heads there had been when the first byte of the next came, and when that must be whole.
    head: Option<(u64, Instant)>,
    cut: Option<Pin<Box<Sleep>>>,
}

impl TimedStream {
    fn new(stream: TcpStream, timeout: Duration, heads: Arc<AtomicU64>) -> Self {
        Self { stream, timeout, heads, answered: 0, head: None, cut: None }
    }

    /// Bytes came: between two requests they are the next one's head.
    fn came(&mut self) {
        let heads = self.heads.load(Ordering::Relaxed);
        if heads == self.answered && self.head.is_none_or(|(before, _)| before != heads) {
            self.head = Some((heads, Instant::now() + self.timeout));
        }
    }

    /// Nothing comes: ready once it has been waited for long enough.
    fn waits(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let due = match self.head {
            Some((before, due)) if before == self.heads.load(Ordering::Relaxed) => due,
            _ => return Poll::Pending,
        };
        // Hyper comes by here with every head, on its way to count it. So a timer stays as it is when its
        // head has come, and is set anew only if it goes off while a later one is waited for.
        let cut = self.cut.get_or_insert_with(|| Box::pin(sleep_until(due)));
        while cut.as_mut().poll(context).is_ready() {
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            cut.as_mut().reset(due);
        }
        Poll::Pending
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.came();
        } else if read.is_pending() && self.waits(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.answered = self.heads.load(Ordering::Relaxed);
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.answered = self.heads.load(Ordering::Relaxed);
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
}

/// Returns once the first bytes are the whole preface, or cannot become it.
async fn spoken(stream: &TcpStream) -> io::Result<Spoken> {
    let mut first = [0; H2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut first).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !H2_PREFACE.starts_with(&first[..count]) {
            return Ok(Spoken::Http1);
        } else if count == first.len() {
            return Ok(Spoken::Http2);
        }
        tokio::time::sleep(PREFACE_INTERVAL).await;
    }
}
