-- Who may call, and what ids are made of. No schema is named anywhere: search_path says which.

CREATE TABLE id_secrets (
    version    smallint    PRIMARY KEY CHECK (version BETWEEN 1 AND 255),
    secret     bytea       NOT NULL CHECK (octet_length(secret) = 32),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE id_secrets IS
    'What the keyed hashes in order and adjustment ids are derived from. Losing a row makes its ids worthless.';

CREATE TABLE api_keys (
    id         text        COLLATE "C" PRIMARY KEY,
    name       text        NOT NULL,
    scope      text        NOT NULL CHECK (scope IN ('orders', 'operator')),
    sha256     bytea       NOT NULL UNIQUE CHECK (octet_length(sha256) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);
COMMENT ON TABLE api_keys IS 'Callers'' keys; only their SHA-256 is stored.';
