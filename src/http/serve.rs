//! Accepting connections: HTTP/1.1 and, by prior knowledge, HTTP/2 on one listener, with bounds on
//! how many there are, how long a head may take, how long a connection may rest and how long an answer
//! may lie untaken, and an end in order.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum_server::accept::Accept;
use axum_server::{Handle, Server};
use hyper_util::rt::TokioTimer;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tower::Service;

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

/// Serves until shut down, then accepts no more, lets what is in flight end, and returns.
///
/// # Errors
/// A listener that cannot be used.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    options: ServeOptions,
    metrics: ConnectionMetrics,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let handle = Handle::new();
    let places = Arc::new(Semaphore::new(options.connections_max));
    let acceptor = Acceptor { options, places, metrics, shutdown: shutdown.clone() };
    let mut server =
        Server::<SocketAddr>::from_listener(listener).acceptor(acceptor).handle(handle.clone());
    let builder = server.http_builder();
    builder
        .http1()
        .timer(TokioTimer::new())
        // To hyper a rest and a head that does not come are one; Connection tells them apart.
        .header_read_timeout(options.idle_timeout)
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

/// Gives a connection its place, then waits until it has said which HTTP it speaks: the server that
/// follows has a time-out for the head, but waits for its first bytes for ever.
#[derive(Debug, Clone)]
struct Acceptor {
    options: ServeOptions,
    places: Arc<Semaphore>,
    metrics: ConnectionMetrics,
    shutdown: CancellationToken,
}

impl<S: Send + 'static> Accept<TcpStream, S> for Acceptor {
    type Stream = Connection;
    type Service = HeadCounter<S>;
    type Future = Pin<Box<dyn Future<Output = io::Result<(Connection, HeadCounter<S>)>> + Send>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let Self { options, places, metrics, shutdown } = self.clone();
        Box::pin(async move {
            let Ok(place) = places.try_acquire_owned() else {
                metrics.refused.inc();
                return Err(io::ErrorKind::ConnectionRefused.into());
            };
            metrics.open.inc();
            let heads = Arc::new(AtomicU64::new(0));
            let mut connection = Connection {
                stream,
                _place: place,
                open: metrics.open,
                header_timeout: None,
                heads: heads.clone(),
                answered: 0,
                head: None,
                cut: None,
            };
            connection.stream.set_nodelay(true)?;
            SockRef::from(&connection.stream).set_tcp_user_timeout(Some(options.write_timeout))?;
            let spoken = tokio::select! {
                spoken = tokio::time::timeout(options.header_timeout, spoken(&connection.stream)) => spoken??,
                () = shutdown.cancelled() => return Err(io::ErrorKind::Interrupted.into()),
            };
            if spoken == Spoken::Http1 {
                connection.header_timeout = Some(options.header_timeout);
            }
            Ok((connection, HeadCounter { service, heads }))
        })
    }
}

/// Counts the heads of a connection that have come whole.
#[derive(Clone)]
struct HeadCounter<S> {
    service: S,
    heads: Arc<AtomicU64>,
}

impl<R, S: Service<R>> Service<R> for HeadCounter<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.heads.fetch_add(1, Ordering::Relaxed);
        self.service.call(request)
    }
}

/// A connection that keeps its place until it is closed, and is closed where a head that has begun does
/// not come whole in time.
struct Connection {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    open: Gauge,
    /// HTTP/2 has no heads in this sense: its pings find who is gone.
    header_timeout: Option<Duration>,
    /// Heads that have come whole, and how many of them had when something was last sent.
    heads: Arc<AtomicU64>,
    answered: u64,
    /// How many heads there had been when the first byte of the next came, and when that must be whole.
    head: Option<(u64, Instant)>,
    cut: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    /// Bytes came: between two requests they are the next one's head.
    fn came(&mut self) {
        let Some(timeout) = self.header_timeout else { return };
        let heads = self.heads.load(Ordering::Relaxed);
        if heads == self.answered && self.head.is_none_or(|(before, _)| before != heads) {
            self.head = Some((heads, Instant::now() + timeout));
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

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl AsyncRead for Connection {
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

impl AsyncWrite for Connection {
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
