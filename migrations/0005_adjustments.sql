-- Adjustments that set a total, and adjustments that undo others.

ALTER TABLE adjustments
    ADD COLUMN set_total bigint CHECK (set_total BETWEEN 0 AND 1000000000),
    ADD COLUMN undoes text COLLATE "C" REFERENCES adjustments (id),
    DROP CONSTRAINT adjustments_delta_check,
    ADD CONSTRAINT adjustments_delta_check CHECK (delta <> 0 OR set_total IS NOT NULL OR undoes IS NOT NULL);
-- Nothing is undone twice; and it finds what undid an adjustment.
CREATE UNIQUE INDEX adjustments_by_undone ON adjustments (undoes) WHERE undoes IS NOT NULL;
COMMENT ON COLUMN adjustments.set_total IS
    'The total that was asked for, where it was not the delta. A delta of 0: the total was right.';
COMMENT ON COLUMN adjustments.undoes IS 'The adjustment of which this one is the exact opposite.';
