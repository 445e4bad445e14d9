-- What operators did about dead letters.

ALTER TABLE dead_letters
    ADD COLUMN status      text        COLLATE "C" NOT NULL DEFAULT 'open'
        CHECK (status IN ('open', 'retried', 'discarded')),
    ADD COLUMN resolved_at timestamptz,
    ADD COLUMN actor       text        COLLATE "C",
    ADD COLUMN note        text,
    ADD COLUMN retries     integer     NOT NULL DEFAULT 0 CHECK (retries >= 0),
    ADD COLUMN retried_at  timestamptz,
    ALTER COLUMN created_at SET DEFAULT date_trunc('milliseconds', now()),
    ADD CONSTRAINT dead_letters_resolved CHECK ((status = 'open') = (resolved_at IS NULL));
CREATE INDEX dead_letters_by_status ON dead_letters (status, id DESC);
COMMENT ON COLUMN dead_letters.status IS
    'retried: what the record says is recorded. discarded: an operator said that it need not be.';
COMMENT ON COLUMN dead_letters.reason IS
    'Why it is not applied, as of the last try; detail too.';
COMMENT ON COLUMN dead_letters.actor IS 'Who last retried or discarded it; note is what they said.';
