//! Connections to Redis. The lanes' calls share one multiplexed connection, which reconnects by
//! itself, and what keeps the lanes' books another; what blocks takes one from a pool.

use std::pin::pin;
use std::time::Duration;

use deadpool_redis::{Connection, Manager, Pool, Runtime};
use futures_util::future::BoxFuture;
use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, IntoConnectionInfo, RedisError, ServerErrorKind,
    Value,
};

use tokio::time::timeout;

use super::scripts::Script;
use crate::config::{self, millis};

/// Why a call to Redis has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// Redis did not take the call: nothing was done.
    #[error("Redis is not available: {0}")]
    Unavailable(String),
    /// The call may have been done all the same.
    #[error("Redis did not answer: {0}")]
    Unknown(String),
}

impl From<RedisError> for CallError {
    fn from(error: RedisError) -> Self {
        match error.kind() {
            // A server that answers with an error has not run the script, or has raised in it
            // before its first write.
            ErrorKind::Server(_)
            | ErrorKind::Extension
            | ErrorKind::AuthenticationFailed
            | ErrorKind::InvalidClientConfig
            | ErrorKind::Client => CallError::Unavailable(error.to_string()),
            _ if error.is_connection_refusal() => CallError::Unavailable(error.to_string()),
            _ => CallError::Unknown(error.to_string()),
        }
    }
}

/// What connecting needs: addresses, credentials and time-outs. Nothing is connected until the
/// first call.
#[derive(Clone)]
pub struct Connections {
    lanes: ConnectionManager,
    /// What relay, recovery and checks ask must not wait behind the lanes' calls. It is driven by the threads
    /// of whoever connects it, as a rule not those that answer callers.
    books: ConnectionManager,
    pool: Pool,
    /// For calls that are proven, which must not keep the others from theirs.
    proving: Pool,
    /// How many must have what is proven.
    replicas: u32,
    /// How long an answer may take.
    response: Duration,
}

impl Connections {
    /// # Errors
    /// An address that cannot be one; an unreachable server is none.
    pub fn new(config: &config::Redis) -> Result<Self, RedisError> {
        let response = millis(config.response_timeout_ms);
        let connect = Some(millis(config.connect_timeout_ms));
        // One attempt, then the caller is told: whoever waits behind it must not wait for retries.
        let manager = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_response_timeout(Some(response))
            .set_connection_timeout(connect);
        // A peer that vanishes without a word must not keep a connection for the kernel's quarter
        // of an hour; and one lane's call must not wait for the acknowledgement of another's.
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_user_timeout(millis(2 * config.response_timeout_ms));
        let address = config.url.as_str().into_connection_info()?.set_tcp_settings(tcp);
        let client = Client::open(address.clone())?;
        let lanes = ConnectionManager::new_lazy_with_config(client.clone(), manager.clone())?;
        let books = ConnectionManager::new_lazy_with_config(client, manager)?;
        // A blocking read waits longer than an ordinary answer may; its caller bounds it.
        let pool = |blocked_max: Duration| {
            let blocking = AsyncConnectionConfig::new()
                .set_connection_timeout(connect)
                .set_response_timeout(Some(response + blocked_max));
            let manager = Manager::new_with_config(address.clone(), blocking)?;
            let pool = Pool::builder(manager)
                .max_size(config.pool_max)
                .runtime(Runtime::Tokio1)
                .wait_timeout(connect)
                .create_timeout(connect)
                .recycle_timeout(connect)
                .build()
                .expect("the runtime that the time-outs need is set");
            Ok::<_, RedisError>(pool)
        };
        let (pool, proving) = (pool(BLOCK_MAX)?, pool(response)?);
        Ok(Self { lanes, books, pool, proving, replicas: config.replicas, response })
    }

    /// Runs a command about the books.
    pub async fn call(&self, command: &Cmd) -> Result<Value, CallError> {
        Ok(send(&self.books, command).await?)
    }

    /// Runs a script about the books.
    pub async fn call_script(&self, script: &Script, call: &Cmd) -> Result<Value, CallError> {
        call_script(&self.books, script, call).await
    }

    /// Runs a lane's call.
    pub async fn call_lane(&self, script: &Script, call: &Cmd) -> Result<Value, CallError> {
        call_script(&self.lanes, script, call).await
    }

    /// A connection for a call that is to be proven.
    pub async fn proving(&self) -> Result<Connection, CallError> {
        self.proving.get().await.map_err(|e| CallError::Unavailable(e.to_string()))
    }

    /// Runs a script call and `WAIT`, one behind the other, on a connection that nobody else has until
    /// both are answered: `WAIT` blocks what follows it, and speaks only of what its connection wrote.
    /// Returns once the script has answered; the rest says whether every replica has what the call
    /// wrote and all that was before it.
    pub async fn call_script_proving(
        &self,
        connection: Connection,
        script: &Script,
        call: &Cmd,
    ) -> Result<(Value, impl Future<Output = bool> + use<>), CallError> {
        let mut sent = self.send_and_wait(&connection, call).await;
        if let Err(error) = &sent
            && error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
        {
            send(&self.lanes, &script.load()).await?;
            sent = self.send_and_wait(&connection, call).await;
        }
        let (value, acknowledged) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                drop(Connection::take(connection));
                return Err(error.into());
            }
        };
        // Where nobody is asked nothing is proven.
        let replicas = i64::from(self.replicas).max(1);
        let proven = async move {
            let count = acknowledged.await;
            if count.is_err() {
                // Nobody may take what it still has to say for an answer of theirs.
                drop(Connection::take(connection));
            }
            matches!(count, Ok(Value::Int(count)) if count >= replicas)
        };
        Ok((value, proven))
    }

    /// Sends the call and `WAIT` at once; the call's answer, and that of `WAIT` when it comes.
    async fn send_and_wait(
        &self,
        connection: &MultiplexedConnection,
        call: &Cmd,
    ) -> Result<(Value, BoxFuture<'static, Result<Value, RedisError>>), RedisError> {
        let (mut calls, mut waits) = (connection.clone(), connection.clone());
        let mut wait = redis::cmd("WAIT");
        wait.arg(self.replicas).arg(self.response.as_millis() as u64);
        let mut answered = pin!(timeout(self.response, calls.send_packed_command(call)));
        let mut acknowledged: BoxFuture<_> =
            Box::pin(async move { waits.send_packed_command(&wait).await?.extract_error() });
        // In this order they are sent, and answered.
        let value = tokio::select! {
            biased;
            answered = &mut answered => answered.map_err(|_| too_late())??.extract_error()?,
            _ = &mut acknowledged => return Err(too_late()),
        };
        Ok((value, acknowledged))
    }

    /// A connection of one's own, for what blocks.
    pub async fn exclusive(&self) -> Result<Connection, CallError> {
        self.pool.get().await.map_err(|e| CallError::Unavailable(e.to_string()))
    }
}

/// What Redis answers with an error comes as a value from the client: here it is an error.
async fn send(connection: &ConnectionManager, command: &Cmd) -> Result<Value, RedisError> {
    connection.clone().send_packed_command(command).await?.extract_error()
}

/// A server that does not know the script (a restart, a fail-over, `SCRIPT FLUSH`) is given it.
async fn call_script(
    connection: &ConnectionManager,
    script: &Script,
    call: &Cmd,
) -> Result<Value, CallError> {
    match send(connection, call).await {
        Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
            send(connection, &script.load()).await?;
            Ok(send(connection, call).await?)
        }
        other => Ok(other?),
    }
}

fn too_late() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

/// The longest that a blocking read may ask to wait.
pub const BLOCK_MAX: Duration = Duration::from_secs(10);
