//! The whole service, from outside: the real binary, the real servers.

mod faults;
mod operation;
mod selling;
mod support;
mod webhooks;
