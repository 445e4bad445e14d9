# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# The caches outlive the layer, so that a change of a line does not build every crate again.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    SQLX_OFFLINE=true cargo build --release --locked -p holdfast --bin holdfast && cp target/release/holdfast /usr/local/bin/

FROM debian:bookworm-slim
# What librdkafka links (TLS, gzip), the authorities that TLS trusts, and curl for the health check.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/* && useradd --system --no-create-home holdfast
COPY --from=build /usr/local/bin/holdfast /usr/local/bin/holdfast
USER holdfast
ENV HOLDFAST_HTTP__LISTEN=0.0.0.0:8080 HOLDFAST_HTTP__INNER_LISTEN=0.0.0.0:8081
EXPOSE 8080 8081
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8080/readyz"]
ENTRYPOINT ["holdfast"]
CMD ["serve"]
